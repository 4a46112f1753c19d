"""Interface of the format modules: ``write`` and ``check``, the export request, and the result of ``check``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gptlab.data.tokenizers.tokenizer import CharactersTokenizer, Tokenizer
from gptlab.exporters.certificate import Check
from gptlab.exporters.formats import DtypeName, FormatName
from gptlab.exporters.reference import Reference
from gptlab.model.gpt import GPT
from gptlab.pretrained.source import ModelSource

# English, code, whitespace, and non-Latin scripts
TEXTS = ("It was 1984, wasn't it? They'd never know.", "\tdef f(x):  return x**2\r\n\n  # end  ", "naïve 東京 🙂 x²\n")

NO_TOKENIZER = "tokenizer, because the tokenizer of this model is unknown and was not exported"


class ExportRequest(NamedTuple):
    """Parameters of one export.

    Attributes:
        source: Model to export.
        format: Export format.
        dtype: dtype of the weights.
        tokenizer: Tokenizer of the model, or None if it is unknown.
        title: Name of the model in the model card.
    """

    source: ModelSource
    format: FormatName
    dtype: DtypeName
    tokenizer: Tokenizer | None
    title: str

    @property
    def end_of_text(self) -> int | None:
        """ID of the end-of-text token, or None if there is none or the tokenizer is unknown."""
        return self.tokenizer.end_of_text if self.tokenizer is not None else None


class CheckResult(NamedTuple):
    """Comparisons of an export, and the quantities that were not compared, each with the reason."""

    checks: Sequence[Check]
    unchecked: Sequence[str]


class FormatModule(Protocol):
    """Module of one export format."""

    def write(self, model: GPT, job: ExportRequest, folder: Path) -> None:
        """Writes the files of the format.

        Args:
            model: Model with the weights to export.
            job: Parameters of the export.
            folder: Directory of the export.
        """

    def check(self, job: ExportRequest, folder: Path, reference: Reference) -> CheckResult:
        """Compares the written files with the reference.

        Args:
            job: Parameters of the export.
            folder: Directory of the export.
            reference: Weights and outputs that the export must reproduce.

        Returns:
            The comparisons, and the quantities that were not compared, each with the reason.
        """


def tensor_dtypes(job: ExportRequest, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Returns the dtype in which each tensor of ``to_external`` is stored.

    In GGUF, vectors and positional embeddings stay in float32, as in llama.cpp's convert_hf_to_gguf.py.
    """
    dtype: torch.dtype = getattr(torch, job.dtype)
    gguf = job.format == "gguf"
    return {
        name: torch.float32 if gguf and (tensor.dim() == 1 or name.endswith("wpe.weight")) else dtype
        for name, tensor in tensors.items()
    }


def omitted_tokenizer(job: ExportRequest, known: tuple[type, ...], reason: str) -> list[str]:
    """Returns a note that the tokenizer was not exported, or an empty list if its type is in ``known``."""
    if job.tokenizer is None:
        return [NO_TOKENIZER]
    if isinstance(job.tokenizer, known):
        return []
    return [f"tokenizer, which was not exported, because {reason}"]


def comparison_texts(tokenizer: Tokenizer) -> Sequence[str]:
    """Returns texts, in the characters of a tokenizer, on which to compare it with another program."""
    if isinstance(tokenizer, CharactersTokenizer):
        return ("".join(2 * character for character in tokenizer.characters),)
    return TEXTS
