"""Token files of others: read where they lie, written for them, and refused by name and offset."""

import numpy as np
import pytest

from gptlab.data.shards.formats import TokenFileLayout, build_manifest, convert, read_layout
from gptlab.data.shards.streams import LocalFolder, TokenStream
from gptlab.data.tokenizers.tokenizer import BytesTokenizer
from gptlab.errors import UserError

TRAIN = np.array([*b"one", 256, *b"two two", 256], dtype="<u2")
VAL = np.array([*"drei\u00e9".encode(), 256], dtype="<u2")


def llmc(tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """The layout by hand: 256 int32, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def write(folder, kind: str):
    """Write TRAIN and VAL as the named program would; return the files."""
    names = {
        "nanogpt": "{}.bin",
        "llmc": "fineweb_{}_000000.bin",
        "llama": "x_{}_000000.bin",
        "npy": "edufineweb_{}_0.npy",
    }
    paths = []
    for split, tokens in (("train", TRAIN), ("val", VAL)):
        path = folder / names[kind].format(split)
        match kind:
            case "nanogpt":
                path.write_bytes(tokens.tobytes())
            case "llmc":
                path.write_bytes(llmc(tokens))
            case "llama":
                path.write_bytes(llmc(tokens.astype("<u4"), 20240801, 7))
            case "npy":
                np.save(path, tokens)
        paths.append(path)
    return paths


@pytest.mark.parametrize("kind", ["nanogpt", "llmc", "llama", "npy"])
def test_every_format_is_read_as_the_tokens_it_holds(tmp_path, kind):
    manifest = build_manifest(write(tmp_path, kind), BytesTokenizer())
    for split, tokens in (("train", TRAIN), ("val", VAL)):
        stream = TokenStream(LocalFolder(tmp_path / "anywhere"), manifest, split)
        assert stream.read([0], len(stream))[0].tolist() == tokens.tolist()
    (train,), (val,) = manifest.splits["train"], manifest.splits["val"]
    assert (train.tokens, train.bytes, train.documents) == (12, 10, 2)
    assert (val.tokens, val.bytes, val.documents) == (7, 6, 1)


def test_where_and_how_the_tokens_stand(tmp_path):
    places = {kind: read_layout(write(tmp_path, kind)[0]) for kind in ("nanogpt", "llmc", "llama", "npy")}
    assert places["nanogpt"] == TokenFileLayout(0, 12, "uint16")
    assert places["llmc"] == TokenFileLayout(1024, 12, "uint16")
    assert places["llama"] == TokenFileLayout(1024, 12, "uint32")
    assert places["npy"] == TokenFileLayout(128, 12, "uint16")  # numpy's header of version 1.0 fills 128 bytes here


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            llmc(TRAIN)[:-2],
            r"should have 1,048 bytes by its header \(12 tokens\) and has 1,046",
        ),
        (llmc(TRAIN, count=13), r"should have 1,050 bytes by its header \(13 tokens\) and has 1,048"),
        (llmc(TRAIN, version=9), r"llm\.c's magic number 20240520 but version 9"),
        (TRAIN.tobytes()[:-1], r"an odd number of bytes, 23"),
        (np.array([5, 6, 300], dtype="<u2").tobytes(), r"token 2 \(byte 4\) is 300, beyond the 257 ids"),
        (llmc(np.array([5, 257], dtype="<u2")), r"token 1 \(byte 1,026\) is 257, beyond the 257 ids"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name_and_place(tmp_path, content, sentence):
    paths = write(tmp_path, "nanogpt")
    paths[0].write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        build_manifest(paths, BytesTokenizer())
    assert str(paths[0]) in str(error.value)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2), dtype="<u2"), np.zeros(3, dtype="<i8"), np.array([{}], dtype=object)]
)
def test_an_array_that_is_no_row_of_tokens_is_refused_and_never_unpickled(tmp_path, array):
    np.save(tmp_path / "train.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"train\.npy (holds|is not an array)"):
        read_layout(tmp_path / "train.npy")


def test_a_file_says_which_split_it_is_and_both_are_needed(tmp_path):
    train, val = write(tmp_path, "nanogpt")
    with pytest.raises(UserError, match="there is none for val"):
        build_manifest([train], BytesTokenizer())
    other = train.rename(tmp_path / "tokens.bin")
    with pytest.raises(UserError, match="should hold either train or val"):
        build_manifest([other, val], BytesTokenizer())


@pytest.mark.parametrize("kind", ["nanogpt", "llmc"])
def test_what_is_written_for_others_is_byte_for_byte_their_layout(tmp_path, kind):
    manifest = build_manifest(write(tmp_path, "npy"), BytesTokenizer())
    train, val = convert(LocalFolder(tmp_path), manifest, kind, tmp_path / "out")
    assert (train.name, val.name) == {
        "nanogpt": ("train.bin", "val.bin"),
        "llmc": ("train_000000.bin", "val_000000.bin"),
    }[kind]
    assert train.read_bytes() == (TRAIN.tobytes() if kind == "nanogpt" else llmc(TRAIN))
    assert val.read_bytes() == (VAL.tobytes() if kind == "nanogpt" else llmc(VAL))
    with pytest.raises(UserError, match="is there already"):
        convert(LocalFolder(tmp_path), manifest, kind, tmp_path / "out")
