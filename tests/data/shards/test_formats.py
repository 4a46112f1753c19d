"""Token files of other programs: reading, writing, and errors with the file and the offset."""

import pickle

import numpy as np
import pytest

from gptlab.data.shards.formats import TokenFileLayout, build_manifest, convert, read_layout
from gptlab.data.shards.streams import LocalFolder, TokenStream
from gptlab.data.tokenizers.tokenizer import BytesTokenizer, CharactersTokenizer
from gptlab.errors import UserError

TRAIN = np.array([*b"one", 256, *b"two two", 256], dtype="<u2")
VAL = np.array([*"drei\u00e9".encode(), 256], dtype="<u2")


def llmc(tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """Returns the content of an llm.c file: 256 int32, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def write(folder, kind: str):
    """Writes TRAIN and VAL in a format and returns the paths."""
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
def test_every_format_is_read_correctly(tmp_path, kind):
    manifest = build_manifest(write(tmp_path, kind), BytesTokenizer())
    for split, tokens in (("train", TRAIN), ("val", VAL)):
        stream = TokenStream(LocalFolder(tmp_path / "anywhere"), manifest, split)
        assert stream.read([0], len(stream))[0].tolist() == tokens.tolist()
    (train,), (val,) = manifest.splits["train"], manifest.splits["val"]
    assert (train.tokens, train.bytes, train.documents) == (12, 10, 2)
    assert (val.tokens, val.bytes, val.documents) == (7, 6, 1)


def test_layout_is_detected(tmp_path):
    places = {kind: read_layout(write(tmp_path, kind)[0]) for kind in ("nanogpt", "llmc", "llama", "npy")}
    assert places["nanogpt"] == TokenFileLayout(0, 12, "uint16")
    assert places["llmc"] == TokenFileLayout(1024, 12, "uint16")
    assert places["llama"] == TokenFileLayout(1024, 12, "uint32")
    assert places["npy"] == TokenFileLayout(128, 12, "uint16")  # size of numpy's header of version 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (llmc(TRAIN)[:-2], r"has 1,046 bytes, but its header \(12 tokens\) requires 1,048 bytes"),
        (llmc(TRAIN, count=13), r"has 1,048 bytes, but its header \(13 tokens\) requires 1,050 bytes"),
        (llmc(TRAIN, version=9), r"magic number 20240520 but the unknown version 9"),
        (b"", r"train\.bin has no tokens"),
        (llmc(TRAIN[:0]), r"train\.bin has no tokens"),
        *((TRAIN.astype(wide).tobytes(), "every second 16-bit value is 0") for wide in ("<u4", "<i4", "<i8")),
        (TRAIN.tobytes()[:-1], r"an odd number of bytes \(23\)"),
        (np.array([5, 6, 300], dtype="<u2").tobytes(), r"token 2 \(byte 4\) is 300, .* vocabulary of 257 token IDs"),
        (llmc(np.array([5, 257], dtype="<u2")), r"token 1 \(byte 1,026\) is 257, .* vocabulary of 257 token IDs"),
    ],
)
def test_invalid_file_is_reported_with_its_name_and_the_error(tmp_path, content, message):
    paths = write(tmp_path, "nanogpt")
    paths[0].write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        build_manifest(paths, BytesTokenizer())
    assert str(paths[0]) in str(error.value)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), dtype="<u2"), np.zeros(3, dtype="<i8"), np.array([{}], dtype=object), np.zeros(0, dtype="<u2")],
)
def test_array_of_wrong_shape_or_dtype_raises_without_unpickling(tmp_path, array):
    np.save(tmp_path / "train.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"train\.npy (holds|is not an array|has no)"):
        read_layout(tmp_path / "train.npy")


def test_file_names_must_identify_both_splits(tmp_path):
    train, val = write(tmp_path, "nanogpt")
    with pytest.raises(UserError, match="none for val"):
        build_manifest([train], BytesTokenizer())
    other = train.rename(tmp_path / "tokens.bin")
    with pytest.raises(UserError, match="must contain either train or val"):
        build_manifest([other, val], BytesTokenizer())


@pytest.mark.parametrize("kind", ["nanogpt", "llmc"])
def test_converted_files_have_the_exact_layout_of_the_format(tmp_path, kind):
    manifest = build_manifest(write(tmp_path, "npy"), BytesTokenizer())
    train, val = convert(LocalFolder(tmp_path), manifest, BytesTokenizer(), kind, tmp_path / "out")
    assert (train.name, val.name) == {
        "nanogpt": ("train.bin", "val.bin"),
        "llmc": ("train_000000.bin", "val_000000.bin"),
    }[kind]
    assert train.read_bytes() == (TRAIN.tobytes() if kind == "nanogpt" else llmc(TRAIN))
    assert val.read_bytes() == (VAL.tobytes() if kind == "nanogpt" else llmc(VAL))
    with pytest.raises(UserError, match="already exists"):
        convert(LocalFolder(tmp_path), manifest, BytesTokenizer(), kind, tmp_path / "out")


def test_converted_characters_have_the_vocabulary_that_nanogpt_reads(tmp_path):
    tokenizer = CharactersTokenizer("\n abé")
    for split in ("train", "val"):
        np.array(tokenizer.encode("a b\né"), dtype="<u2").tofile(tmp_path / f"{split}.bin")
    manifest = build_manifest([tmp_path / "train.bin", tmp_path / "val.bin"], tokenizer)
    convert(LocalFolder(tmp_path), manifest, tokenizer, "nanogpt", tmp_path / "out")
    with (tmp_path / "out" / "meta.pkl").open("rb") as file:  # as in nanoGPT's train.py and sample.py
        meta = pickle.load(file)  # noqa: S301  (written above)
    assert meta["vocab_size"] == 5
    decoded = "".join(meta["itos"][i] for i in np.fromfile(tmp_path / "out" / "val.bin", dtype=np.uint16).tolist())
    assert decoded == "a b\né"
    assert [meta["stoi"][character] for character in decoded] == tokenizer.encode(decoded).tolist()


def test_other_tokenizers_than_gpt2_are_mentioned_because_the_files_do_not_name_them(tmp_path, caplog):
    manifest = build_manifest(write(tmp_path, "npy"), BytesTokenizer())
    convert(LocalFolder(tmp_path), manifest, BytesTokenizer(), "llmc", tmp_path / "out")
    assert "tokenizer=bytes" in caplog.text
    caplog.clear()
    gpt2 = manifest.model_copy(update={"tokenizer": {"name": "gpt2"}})
    convert(LocalFolder(tmp_path), gpt2, BytesTokenizer(), "llmc", tmp_path / "gpt2")
    assert not caplog.text
