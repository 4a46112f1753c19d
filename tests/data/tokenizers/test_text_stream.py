"""Text as it comes, against the whole text decoded at once."""

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
def test_every_piece_is_whole_characters_and_together_they_are_the_text(tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, [])
    pieces = [stream.push([i]) for i in ids]
    assert "".join(pieces) + stream.close() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    if tokenizer is not TOKENIZERS["characters"]:
        assert "" in pieces  # there were tokens that are parts of a character
    assert "".join(pieces) == TEXT  # nothing was kept back to the end


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_what_is_no_text_comes_out_as_when_decoded_at_once(name):
    tokenizer, drawn = TOKENIZERS[name], np.random.default_rng(0)
    for _ in range(50):
        ids = drawn.integers(tokenizer.vocab_size, size=30).tolist()
        stream = TextStream(tokenizer, [])
        assert "".join([stream.push([i]) for i in ids]) + stream.close() == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("at_once", [1, 3, 1000])
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
def test_a_text_ends_before_the_first_stop_string_wherever_tokens_meet(tokenizer, at_once, stops, expected):
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, stops)
    given = ""
    for begin in range(0, len(ids), at_once):
        given += stream.push(ids[begin : begin + at_once])
        assert expected.startswith(given)
    assert given + stream.close() == expected
    assert stream.ended == (expected != TEXT)
    assert stream.push([ids[0]]) == "" or not stream.ended


def test_the_end_of_text_is_a_stop_string_as_any_other():
    tokenizer = TOKENIZERS["gpt2"]
    stream = TextStream(tokenizer, ["<|endoftext|>"])
    assert stream.push([*tokenizer.encode("one").tolist(), tokenizer.end_of_text, 5]) == "one"
    assert stream.ended
