"""Token IDs in the shards are those of tiktoken's gpt2 for every text and encoder."""

import json
import logging
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.token_dataset import TokenDataset
from preparing import data_config, is_in_val, prepare_text, tiktoken_gpt2, tokenizer_config

END = 50256
BY_DOCUMENTS = {"val_split": "documents", "val_fraction": 0.2}


@pytest.fixture(params=["gigatoken", "tiktoken"])
def encoder(request, monkeypatch, caplog):
    """Runs the test with gigatoken, and as if gigatoken were not installed."""
    if request.param == "gigatoken":
        pytest.importorskip("gigatoken")
    else:
        monkeypatch.setattr("gptlab.data.prepare.prepare.bulk_encoder", lambda tokenizer: None)
    caplog.set_level(logging.INFO, "gptlab")
    yield request.param
    messages = [record.message for record in caplog.get_records("call") if "gigatoken" in record.message]
    assert [message.split(",")[0] for message in messages] == ["Using gigatoken"] * (request.param == "gigatoken")


def ids_of(prepared: TokenDataset, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2") for path in sorted(prepared.folder.glob(f"{split}_*.bin"))])


def expected_ids(documents: list[tuple[str, str]], split: str) -> np.ndarray:
    """Returns the token IDs of the documents of a split, each followed by an end-of-text token."""
    fraction = BY_DOCUMENTS["val_fraction"]
    texts = [text for name, text in documents if text and is_in_val(name, fraction) == (split == "val")]
    encoded = tiktoken_gpt2().encode_ordinary_batch(texts, num_threads=2)
    return np.concatenate([np.array([*ids, END], dtype="<u2") for ids in encoded])


# --- the standard library


@pytest.fixture(scope="module")
def standard_library() -> dict[str, np.ndarray]:
    """Token IDs of its modules except tests, encodings and installed packages, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    names = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    names = [name for name in names if not excluded & set(name.parts) and not str(name).startswith(".")]
    documents = [(name.as_posix(), (root / name).read_bytes().decode(errors="replace")) for name in names]
    assert sum(len(text) for _, text in documents) > 8e6
    return {split: expected_ids(documents, split) for split in ("train", "val")}


def test_token_ids_of_the_standard_library_match_tiktoken(tmp_path, standard_library, encoder):
    config = data_config(corpus="python_stdlib", cache_dir=str(tmp_path), task_bytes=100_000, **BY_DOCUMENTS)
    prepared = prepare(config, tokenizer_config("gpt2"), PrepareOptions(workers=2))
    assert len(prepared.manifest.splits["train"]) > 50
    assert any(shard.documents == 0 for shard in prepared.manifest.shards())  # the middle of a divided module
    for split, expected in standard_library.items():
        np.testing.assert_array_equal(ids_of(prepared, split), expected)


# --- adversarial text

ODD = [
    "👩‍👩‍👧‍👦 🏳️‍🌈🇩🇪 👍🏽👍🏿 ❤️‍🔥" * 20,
    "你好，世界。これはテスト。한국어 " * 20,
    "\0" * 50 + " \0 a\0b\n\0",
    "<|endoftext|>",
    "one<|endoftext|>two <|endoftext|>\n<|endoftext|><|endoftext|>",
    "e\u0301 \u202eright to left\u202c \ufeff\u200b\x85\u2028\x1c",
    "I'LL we'll 's's ''s  's",
    " \t\r\n" * 30 + "x" + " " * 200,
    "x" * 999,
]
# JSON escapes and the text that they encode
SPELLED = {
    "a\\ud800b": "a\ufffdb",
    "\\udfff": "\ufffd",
    "\\ud83d\\ude00": "😀",
    "\\ud83d \\ude00": "\ufffd \ufffd",
    "\\u0000<|endoftext|>\\u0000": "\0<|endoftext|>\0",
}
BROKEN = b"some good words \xff\xfe \xc3( \xe2\x82 \xf0\x9f\x98 \xed\xa0\x80 \xc0\xaf ok <|endoftext|>\n\xf0\x9f" * 20


@pytest.mark.parametrize("task_bytes", [100, 10**6])
def test_token_ids_of_adversarial_documents_match_tiktoken(tmp_path, encoder, task_bytes):
    lines = [json.dumps({"text": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(ODD)]
    lines += [f'{{"text": "{spelling}"}}' for spelling in SPELLED]
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_text("\n".join(lines * 4))
    begins = np.cumsum([0, *(len(line.encode()) + 1 for line in lines * 4)]).tolist()
    documents = [(f"a.jsonl:{begin}", text) for begin, text in zip(begins, [*ODD, *SPELLED.values()] * 4, strict=False)]
    for name, content in (
        ("b.txt", BROKEN),
        ("c.txt", "".join(ODD).replace("\0", "").encode()),
        ("d.txt", b"<|endoftext|>"),
    ):
        (source / name).write_bytes(content)
        documents.append((name, content.decode(errors="replace")))

    prepared = prepare_text(source, "gpt2", column="text", task_bytes=task_bytes, **BY_DOCUMENTS)
    ends = 0
    for split in ("train", "val"):
        ids = ids_of(prepared, split)
        np.testing.assert_array_equal(ids, expected_ids(documents, split))
        ends += int((ids == END).sum())
    assert ends == len(documents) == 4 * 14 + 3


# --- ten megabytes without a space


def letters(size: int) -> str:
    return np.random.default_rng(0).integers(ord("a"), ord("z") + 1, size, dtype=np.uint8).tobytes().decode()


def han(size: int) -> str:
    return "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FA6, size // 3).tolist()))


SIZE = 10**7
WITHOUT_SPACE = {"letters": letters, "han": han}


def prepare_long(folder: Path, text: str, val_fraction: float = 0.1) -> TokenDataset:
    (folder / "long.txt").write_text(text)
    return prepare_text(folder / "long.txt", "gpt2", task_bytes=10**6, val_fraction=val_fraction)


@pytest.mark.parametrize(("kind", "size"), [pytest.param("han", SIZE, marks=pytest.mark.slow), ("letters", SIZE // 10)])
def test_token_ids_of_megabytes_without_a_space_match_tiktoken(tmp_path, encoder, kind, size):
    text = WITHOUT_SPACE[kind](size)
    assert len(text.encode()) == pytest.approx(size, abs=3)
    prepared = prepare_long(tmp_path, text)
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        expected = tiktoken_gpt2().encode_to_numpy(part, disallowed_special=())
        np.testing.assert_array_equal(ids_of(prepared, split), np.append(expected, END))


@pytest.mark.slow
def test_ten_megabytes_of_one_letter_repeat_its_longest_token(tmp_path, encoder):
    prepared = prepare_long(tmp_path, "a" * SIZE)
    four = tiktoken_gpt2().encode_single_token("aaaa")
    for split, size in (("train", SIZE * 9 // 10), ("val", SIZE // 10)):
        np.testing.assert_array_equal(ids_of(prepared, split), np.append(np.full(size // 4, four), END))


def test_ten_megabytes_of_spaces_before_a_word_are_encoded_correctly(tmp_path, encoder):
    prepared = prepare_long(tmp_path, "a" + " " * (SIZE - 6) + "words", val_fraction=0.5)
    a, space, words = (tiktoken_gpt2().encode_single_token(token) for token in ("a", " ", " words"))
    half = SIZE // 2
    np.testing.assert_array_equal(ids_of(prepared, "train"), np.concatenate(([a], np.full(half - 1, space), [END])))
    np.testing.assert_array_equal(ids_of(prepared, "val"), np.append(np.full(half - 6, space), [words, END]))
