"""What every format is given, and what it gives back."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.data.tokenizers.tokenizer import CharactersTokenizer, Tokenizer
from gptlab.exporters.certificate import Check
from gptlab.exporters.formats import DtypeName, FormatName
from gptlab.pretrained.source import ModelSource

# of English, code, white space, and scripts beyond Latin
TEXTS = ("It was 1984, wasn't it? They'd never know.", "\tdef f(x):  return x**2\r\n\n  # end  ", "naïve 東京 🙂 x²\n")

NO_TOKENIZER = "the tokenizer: nothing says what this model's ids mean, so none is written"


class ExportRequest(NamedTuple):
    """One export.

    Attributes:
        source: What is exported.
        format: To which format.
        dtype: Of the weights.
        tokenizer: The model's; None where nothing says what its ids mean.
        title: The model's name, for people.
    """

    source: ModelSource
    format: FormatName
    dtype: DtypeName
    tokenizer: Tokenizer | None
    title: str

    @property
    def end_of_text(self) -> int | None:
        """The tokenizer's."""
        return self.tokenizer.end_of_text if self.tokenizer is not None else None

    def stored(self, name: str, tensor: Tensor) -> torch.dtype:
        """Type in which a tensor of ``to_external`` is stored; llama.cpp's as its convert_hf_to_gguf.py stores it."""
        if self.format == "gguf" and (tensor.dim() == 1 or name.endswith("wpe.weight")):
            return torch.float32
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class CheckResult(NamedTuple):
    """What a format's reader has found, and what could not be looked at, each with the reason."""

    checks: Sequence[Check]
    unchecked: Sequence[str]


def tensor_dtypes(job: ExportRequest, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Type in which each of some tensors is stored."""
    return {name: job.stored(name, tensor) for name, tensor in tensors.items()}


def omitted_tokenizer(job: ExportRequest, known: tuple[type, ...], whose: str) -> list[str]:
    """Say that a tokenizer is not in the files, where it is none of those that the other side has."""
    if job.tokenizer is None:
        return [NO_TOKENIZER]
    if isinstance(job.tokenizer, known):
        return []
    return [f"the tokenizer: {whose}, so this one is left out"]


def comparison_texts(tokenizer: Tokenizer) -> Sequence[str]:
    """Texts that a tokenizer knows, to compare it by."""
    if isinstance(tokenizer, CharactersTokenizer):
        return ("".join(2 * character for character in tokenizer.characters),)
    return TEXTS
