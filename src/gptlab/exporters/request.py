"""Interface of the formats: the request that they get, and the result of their check."""

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
        source: Model to export.
        format: Format to export to.
        dtype: Dtype of the weights.
        tokenizer: Tokenizer of the model; None if it is unknown.
        title: Name of the model in its card.
    """

    source: ModelSource
    format: FormatName
    dtype: DtypeName
    tokenizer: Tokenizer | None
    title: str

    @property
    def end_of_text(self) -> int | None:
        """End-of-text id of the tokenizer."""
        return self.tokenizer.end_of_text if self.tokenizer is not None else None


class CheckResult(NamedTuple):
    """Comparisons that a format's reader made, and what was not compared, each with the reason."""

    checks: Sequence[Check]
    unchecked: Sequence[str]


def tensor_dtypes(job: ExportRequest, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Returns the dtype in which each tensor of ``to_external`` is stored.

    For llama.cpp, vectors and positions stay in float32, as its convert_hf_to_gguf.py has them.
    """
    dtype: torch.dtype = getattr(torch, job.dtype)
    gguf = job.format == "gguf"
    return {
        name: torch.float32 if gguf and (tensor.dim() == 1 or name.endswith("wpe.weight")) else dtype
        for name, tensor in tensors.items()
    }


def omitted_tokenizer(job: ExportRequest, known: tuple[type, ...], whose: str) -> list[str]:
    """Returns the note that the tokenizer is not exported, unless its type is in ``known``."""
    if job.tokenizer is None:
        return [NO_TOKENIZER]
    if isinstance(job.tokenizer, known):
        return []
    return [f"the tokenizer: {whose}, so this one is left out"]


def comparison_texts(tokenizer: Tokenizer) -> Sequence[str]:
    """Returns texts to compare a tokenizer by, in its own characters."""
    if isinstance(tokenizer, CharactersTokenizer):
        return ("".join(2 * character for character in tokenizer.characters),)
    return TEXTS
