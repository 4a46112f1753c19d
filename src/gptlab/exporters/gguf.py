"""A file for llama.cpp, as its convert_hf_to_gguf.py writes it of a GPT2LMHeadModel."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptlab.data.tokenizers.huggingface import as_byte_level_bpe
from gptlab.exporters.certificate import Check, compare_tensors, version
from gptlab.exporters.reference import Reference
from gptlab.exporters.request import CheckResult, ExportRequest, tensor_dtypes
from gptlab.model.config import NORM_EPSILON
from gptlab.model.external import to_external
from gptlab.model.gpt import GPT

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
ARCHITECTURE = "gpt2"
# llama.cpp wants merges where there are none: this one never happens, since nothing merges into the end of text
NO_MERGE = "<|endoftext|> <|endoftext|>"


def write(model: GPT, job: ExportRequest, folder: Path) -> None:
    """Write the weights one after the other, after what describes them and the tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURE)
    config = model.config
    writer.add_name(job.title)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(NORM_EPSILON)
    half = gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(half if job.dtype == "float16" else gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, job)
    tensors = to_external(model, transposed=False, biases=True)
    stored, names = tensor_dtypes(job, tensors), _names(config.n_layer)
    for name, tensor in tensors.items():
        like = torch.empty(0, dtype=stored[name])
        writer.add_tensor_info(names(name), tensor.shape, like.numpy().dtype, tensor.numel() * like.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(tensor.to(stored[name]).contiguous().numpy())
    writer.close()


def check(job: ExportRequest, folder: Path, reference: Reference) -> CheckResult:
    """Read it with the gguf library, and with llama.cpp where xllamacpp is installed, which has that in a wheel."""
    checks = [compare_tensors(_read(folder / FILE, job, list(reference.tensors)), reference, version("gguf"))]
    if find_spec("xllamacpp") is None:
        return CheckResult(checks, ["logits, continuation and tokenizer, since xllamacpp (llama.cpp) is not installed"])
    from gptlab.exporters.llama_cpp import check_with_llama_cpp

    compared: list[Check] = list(check_with_llama_cpp(job, folder / FILE, reference))
    return CheckResult([*checks, *compared], [])


def _add_tokenizer(writer: "GGUFWriter", job: ExportRequest) -> None:
    from gguf import TokenType

    bpe = as_byte_level_bpe(job.tokenizer) if job.tokenizer is not None else None
    assert bpe is not None  # noqa: S101  (what check_format guarantees)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(bpe.tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(bpe.tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair) for pair in bpe.merges] or [NO_MERGE])
    writer.add_bos_token_id(len(bpe.tokens) - 1)
    writer.add_eos_token_id(len(bpe.tokens) - 1)
    writer.add_add_bos_token(False)


def _names(layers: int) -> Callable[[str], str]:
    """Return what names a tensor of ``to_external`` in the file."""
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, layers)

    def name_of(name: str) -> str:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None  # noqa: S101  (every tensor of a GPT-2 has one)
        return found

    return name_of


def _read(path: Path, job: ExportRequest, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    import gguf

    there = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "c").tensors}
    name_of = _names(job.source.model.n_layer)
    for name in names:
        if (data := there.pop(name_of(name), None)) is not None:
            yield name, torch.from_numpy(data)
    yield from ((name, torch.from_numpy(data)) for name, data in there.items())
