"""Byte-level BPE trained on the corpus."""

import json
import random

import pytest
import regex
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer

from gptlab.data.tokenizers.tokenizer import BPETokenizer, _divide_long_words, load_tokenizer, prompt_ids
from preparing import prepare_text

CORPUS = ["the cat sat on the mat; the hat is that cat's\n" * 20, "naïve café 👍 été\n" * 10]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CORPUS, vocab_size=280)


def texts() -> list[str]:
    """Returns texts with every byte value, emoji, CJK, NUL, spelled-out special tokens and random code points."""
    draw = random.Random(0)  # noqa: S311
    anything = ["".join(chr(draw.randrange(0x11_0000)) for _ in range(200)) for _ in range(20)]
    clean = [text.encode("utf-8", errors="ignore").decode() for text in anything]
    return [*clean, "", "\0\x01", "<|endoftext|>", "".join(map(chr, range(256))), " " * 999, "你好 🇩🇪\r\n\t"]


def test_encoding_round_trips_for_any_text(bpe):
    for text in texts():
        assert bpe.decode(bpe.encode(text).tolist()) == text


def test_no_text_is_encoded_as_the_end_of_text_token(bpe):
    assert bpe.end_of_text == bpe.vocab_size - 1 == 279
    assert all(bpe.end_of_text not in bpe.encode(text) for text in texts())
    assert bpe.decode([bpe.end_of_text]) == "<|endoftext|>"
    assert prompt_ids(bpe, "") == [279]


def test_token_bytes_sum_to_the_bytes_of_the_text(bpe):
    lengths = bpe.token_bytes()
    assert (len(lengths), lengths[-1]) == (280, 0)
    for text in texts():
        assert lengths[bpe.encode(text)].sum() == len(text.encode())


def test_repeated_text_is_merged(bpe):
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0].encode()) / 2
    assert bpe.decode(bpe.encode(" the").tolist()) == " the"
    assert len(bpe.encode(" the")) == 1


def test_record_is_json_that_the_tokenizers_library_reads(bpe):
    record = json.loads(json.dumps(bpe.record()))
    again = load_tokenizer(record, vocab_dir=None)
    theirs = Tokenizer.from_str(record["trained"])
    for text in texts():
        assert again.encode(text).tolist() == bpe.encode(text).tolist() == theirs.encode(text).ids


def test_bpe_replaces_lone_surrogates(bpe):
    assert bpe.decode(bpe.encode("a\ud800b").tolist()) == "a\ufffdb"


def test_training_is_deterministic(bpe):
    assert BPETokenizer.train(CORPUS, vocab_size=280).record() == bpe.record()


def test_bpe_is_trained_on_train_mb_of_text_from_the_whole_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 500)
    (tmp_path / "b.txt").write_text("cd" * 500)
    (tmp_path / "c.txt").write_text("ef" * 5 + "gh" * 495)
    several = {"tokenizer": "bpe", "vocab_size": 1000, "task_bytes": 900}  # one task per file

    def has_merges_for(prepared, text: str) -> bool:
        return len(prepared.tokenizer.encode(text)) < len(text)

    whole = prepare_text(tmp_path, **several, cache_dir=str(tmp_path.parent / "whole"), train_mb=1.0)
    assert all(has_merges_for(whole, text) for text in ("abab", "cdcd", "efef", "ghgh"))
    little = prepare_text(tmp_path, **several, cache_dir=str(tmp_path.parent / "little"), train_mb=30 / 1e6)
    assert [has_merges_for(little, text) for text in ("abab", "cdcd", "efef", "ghgh")] == [True, True, True, False]
    assert little.folder.name != whole.folder.name


@pytest.mark.parametrize(
    "long",
    ["a" * 2500, "7" * 1500, "_-" * 800, " \n" * 600, "acgt" * 900, "é" * 1000, "1½" * 600, "\x1c!" * 600, "語" * 3000],
)
def test_long_words_are_divided_for_training_and_other_text_is_not(long):
    text = f"one two, {long} three\n"
    parts = list(_divide_long_words(text))
    assert "".join(parts) == text
    words = [word for part in parts for word in regex.findall(r50k_pat_str, part)]
    assert len(parts) > 1
    assert max(map(len, words)) <= 1001  # with the space in front of a word
    for kept in ("a" * 999, "word " * 999, "don't 12,345.\n" * 100, ""):
        assert list(_divide_long_words(kept)) == [kept]


def test_a_tokenizer_is_trained_on_a_megabyte_without_white_space():
    draw = random.Random(0)  # noqa: S311
    bpe = BPETokenizer.train(["a" * 10**6, "".join(draw.choices("acgt", k=50_000))], vocab_size=300)
    assert bpe.decode(bpe.encode("acgt" * 600).tolist()) == "acgt" * 600
    assert len(bpe.encode("a" * 1024)) < 100
