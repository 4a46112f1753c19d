"""Incremental decoding compared with decoding the whole text."""

import numpy as np
import pytest

from gptlab.data.tokenizers.text_stream import TextStream
from gptlab.data.tokenizers.tokenizer import BPETokenizer, BytesTokenizer, CharactersTokenizer, load_tokenizer

TEXT = "naïve café: 日本語, 😀👩‍👩‍👧 and \n\n more"
TOKENIZERS = {
    "bytes": BytesTokenizer(),
    "characters": CharactersTokenizer("".join(sorted(set(TEXT)))),
    "gpt2": load_tokenizer({"name": "gpt2"}, None),
    "bpe": BPETokenizer.train([TEXT], 280),
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, [])
    pieces = [stream.push([i]) for i in ids]
    assert "".join(pieces) + stream.close() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    if tokenizer is not TOKENIZERS["characters"]:
        assert "" in pieces  # some tokens are parts of a character
    assert "".join(pieces) == TEXT  # nothing was held back until the end


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_random_token_ids_decode_as_in_one_call(name):
    tokenizer, drawn = TOKENIZERS[name], np.random.default_rng(0)
    for _ in range(50):
        ids = drawn.integers(tokenizer.vocab_size, size=30).tolist()
        stream = TextStream(tokenizer, [])
        assert "".join([stream.push([i]) for i in ids]) + stream.close() == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["fé:"], "naïve ca"),
        (["語, 😀", "nothing"], "naïve café: 日本"),
        (["x", "more", "\n\n"], TEXT[: TEXT.index("\n\n")]),
        (["\n\n\n", "👧👧"], TEXT),
        (["e,", " more!", "n"], ""),
        (["more"], TEXT[:-4]),
    ],
)
def test_text_ends_before_the_first_stop_string(tokenizer, step, stops, expected):
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, stops)
    given = ""
    for begin in range(0, len(ids), step):
        given += stream.push(ids[begin : begin + step])
        assert expected.startswith(given)
    assert given + stream.close() == expected
    assert stream.ended == (expected != TEXT)
    assert stream.push([ids[0]]) == "" or not stream.ended


def test_end_of_text_token_can_be_a_stop_string():
    tokenizer = TOKENIZERS["gpt2"]
    stream = TextStream(tokenizer, ["<|endoftext|>"])
    assert stream.push([*tokenizer.encode("one").tolist(), tokenizer.end_of_text, 5]) == "one"
    assert stream.ended
