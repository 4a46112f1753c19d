"""Faster encoder for preparation: gigatoken, used only if it returns the same token IDs as the tokenizer."""

import base64
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptlab.data.tokenizers.text import END_OF_TEXT, replace_surrogates
from gptlab.data.tokenizers.tokenizer import BPETokenizer, GPT2Tokenizer, Tokenizer

Encode = Callable[[str], NDArray[np.uint32]]

SAMPLE_BYTES = 2**20  # size of the sample of the corpus on which the two encoders are compared
ADVERSARIAL = (END_OF_TEXT, " " * 1000 + "x", "\0\x85 é\u3000 \ufeff\r\n\t \n", "a\n" * 100 + "👩‍👧 你好", "'S'll ' s")


def bulk_encoder(tokenizer: Tokenizer) -> Encode | None:
    """Builds gigatoken's encoder for ``tokenizer``. Returns None if gigatoken is not installed or lacks support."""
    if importlib.util.find_spec("gigatoken") is None:
        return None
    import gigatoken

    if isinstance(tokenizer, GPT2Tokenizer):
        with tempfile.TemporaryDirectory() as folder:
            ranks = Path(folder) / "gpt2.tiktoken"
            ranks.write_bytes(
                b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tokenizer.merges.items())
            )
            fast = gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="gpt2")
    elif isinstance(tokenizer, BPETokenizer):
        fast = gigatoken.Tokenizer.from_json(tokenizer.trained)
    else:
        return None
    return lambda text: np.asarray(fast.encode(replace_surrogates(text)), dtype=np.uint32)


def is_equivalent(tokenizer: Tokenizer, encode: Encode, samples: Sequence[Iterable[str]]) -> bool:
    """Returns whether ``encode`` agrees with the tokenizer on adversarial text and the beginnings of ``samples``.

    Args:
        tokenizer: Tokenizer to compare with.
        encode: Encoder to check.
        samples: Texts from several positions of the corpus.
    """
    sample = chain(ADVERSARIAL, *(take_characters(texts, SAMPLE_BYTES // len(samples)) for texts in samples))
    return all(np.array_equal(encode(text), tokenizer.encode(text)) for text in sample)


def take_characters(texts: Iterable[str], size: float) -> Iterator[str]:
    """Yields the first ``size`` characters of the concatenated texts, text by text."""
    for text in texts:
        yield text[: int(size)]
        size -= len(text)
        if size <= 0:
            return
