"""The bulk encoder is used only if it gives the same token IDs as the tokenizer."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.prepare.prepare import prepare
from gptlab.data.tokenizers import bulk
from gptlab.data.tokenizers.bulk import bulk_encoder, is_equivalent
from gptlab.data.tokenizers.tokenizer import BPETokenizer, BytesTokenizer, GPT2Tokenizer
from preparing import data_config, text_values, tokenizer_config


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Source files of the standard library's top directory: 8 MB of text."""
    root = Path(sysconfig.get_path("stdlib"))
    return [path.read_text("utf-8", errors="replace") for path in sorted(root.glob("*.py"))]


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_gigatoken_gives_the_token_ids_of_the_tokenizer(texts, name):
    tokenizer = GPT2Tokenizer(None) if name == "gpt2" else BPETokenizer.train(texts[:30], 1000)
    encode = bulk_encoder(tokenizer)
    for text in (*bulk.ADVERSARIAL, *texts[:80], "a\ud800b", ""):
        assert np.array_equal(encode(text), tokenizer.encode(text))
    assert is_equivalent(tokenizer, encode, [texts])


def test_encoder_that_differs_on_the_sample_is_not_equivalent(texts):
    tokenizer = GPT2Tokenizer(None)
    for odd in (bulk.ADVERSARIAL[0], texts[7]):
        assert not is_equivalent(
            tokenizer, lambda text, odd=odd: tokenizer.encode(text)[text == odd :], [texts[9:], texts]
        )


def test_bytes_tokenizer_has_no_bulk_encoder():
    assert bulk_encoder(BytesTokenizer()) is None


@pytest.mark.parametrize("wrong_encoder", [False, True])
def test_wrong_bulk_encoder_is_not_used(tmp_path, monkeypatch, wrong_encoder):
    (tmp_path / "text.txt").write_text("some words, and some more words\n" * 200)
    if wrong_encoder:
        wrong = np.zeros(1, dtype=np.uint32)
        monkeypatch.setattr("gptlab.data.prepare.prepare.bulk_encoder", lambda _: lambda text: wrong)
    config = data_config(**text_values(tmp_path / "text.txt", task_bytes=10**6))
    prepared = prepare(config, tokenizer_config("gpt2"))
    text = (tmp_path / "text.txt").read_text()
    expected = [*GPT2Tokenizer(None).encode(text[: int(len(text) * 0.9)]).tolist(), 50256]
    assert np.fromfile(prepared.folder / "train_000000.bin", "<u2").tolist() == expected
    assert json.loads((prepared.folder / "manifest.json").read_text())["tokenizer"] == {"name": "gpt2"}
