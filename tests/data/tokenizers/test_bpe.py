"""The byte-level BPE of a corpus' own."""

import json
import random

import pytest
from tokenizers import Tokenizer

from gptlab.data.tokenizers.tokenizer import BPETokenizer, load_tokenizer, prompt_ids
from preparing import prepare_text

CORPUS = ["the cat sat on the mat; the hat is that cat's\n" * 20, "naïve café 👍 été\n" * 10]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CORPUS, vocab_size=280)


def texts() -> list[str]:
    """Any text: every byte value, emoji, CJK, NUL, special tokens spelled out, and random code points."""
    draw = random.Random(0)  # noqa: S311
    anything = ["".join(chr(draw.randrange(0x11_0000)) for _ in range(200)) for _ in range(20)]
    clean = [text.encode("utf-8", errors="ignore").decode() for text in anything]
    return [*clean, "", "\0\x01", "<|endoftext|>", "".join(map(chr, range(256))), " " * 999, "你好 🇩🇪\r\n\t"]


def test_any_text_comes_back_exactly(bpe):
    for text in texts():
        assert bpe.decode(bpe.encode(text).tolist()) == text


def test_no_text_becomes_the_end_of_text(bpe):
    assert bpe.end_of_text == bpe.vocab_size - 1 == 279
    assert all(bpe.end_of_text not in bpe.encode(text) for text in texts())
    assert bpe.decode([bpe.end_of_text]) == "<|endoftext|>"
    assert prompt_ids(bpe, "") == [279]


def test_the_bytes_of_the_tokens_are_those_of_the_text(bpe):
    lengths = bpe.token_bytes()
    assert (len(lengths), lengths[-1]) == (280, 0)
    for text in texts():
        assert lengths[bpe.encode(text)].sum() == len(text.encode())


def test_merges_are_learnt_where_the_corpus_repeats_itself(bpe):
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0].encode()) / 2
    assert bpe.decode(bpe.encode(" the").tolist()) == " the"
    assert len(bpe.encode(" the")) == 1


def test_it_is_stored_as_plain_data_that_the_tokenizers_library_reads(bpe):
    record = json.loads(json.dumps(bpe.record()))
    again = load_tokenizer(record, vocab_dir=None)
    theirs = Tokenizer.from_str(record["trained"])
    for text in texts():
        assert again.encode(text).tolist() == bpe.encode(text).tolist() == theirs.encode(text).ids


def test_a_lone_surrogate_is_replaced(bpe):
    assert bpe.decode(bpe.encode("a\ud800b").tolist()) == "a?b"


def test_training_twice_gives_the_same(bpe):
    assert BPETokenizer.train(CORPUS, vocab_size=280).record() == bpe.record()


def test_it_is_trained_on_so_much_text_from_all_over_the_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 500)
    (tmp_path / "b.txt").write_text("cd" * 500)
    (tmp_path / "c.txt").write_text("ef" * 5 + "gh" * 495)
    several = {"tokenizer": "bpe", "vocab_size": 1000, "task_bytes": 900}  # a task for each file

    def knows(prepared, text: str) -> bool:
        return len(prepared.tokenizer.encode(text)) < len(text)

    whole = prepare_text(tmp_path, **several, cache_dir=str(tmp_path.parent / "whole"), train_mb=1.0)
    assert all(knows(whole, text) for text in ("abab", "cdcd", "efef", "ghgh"))
    little = prepare_text(tmp_path, **several, cache_dir=str(tmp_path.parent / "little"), train_mb=30 / 1e6)
    assert [knows(little, text) for text in ("abab", "cdcd", "efef", "ghgh")] == [True, True, True, False]
    assert little.folder.name != whole.folder.name
