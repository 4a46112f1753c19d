"""llm.c files: weights and GPT-2's tokens (karpathy/llm.c, train_gpt2.py: write_model, write_tokenizer)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptlab.data.tokenizers.tokenizer import GPT2Tokenizer
from gptlab.exporters.certificate import compare_scores, compare_tensors, version
from gptlab.exporters.reference import Reference
from gptlab.exporters.request import CheckResult, ExportRequest, omitted_tokenizer
from gptlab.model.config import GPTConfig
from gptlab.model.external import fit_shapes, from_external, to_external
from gptlab.model.gpt import GPT
from gptlab.model.modern import meta_gpt

WEIGHTS, TOKENS = "model.bin", "gpt2_tokenizer.bin"
MAGIC, TOKENS_MAGIC, TOKENS_VERSION = 20240326, 20240328, 2
VERSIONS = {"float32": 3, "bfloat16": 5}
HEADER = 256  # number of int32 values
ROWS = 128  # the vocabulary is padded with zeros to a multiple of this
RELATIVE = 2e-6  # relative tolerance of the logits, because zero biases are added to a model without biases
# Parameters of the blocks, in the order of the file. Each is stored for all blocks before the next one.
OF_BLOCKS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def write(model: GPT, job: ExportRequest, folder: Path) -> None:
    """Writes model.bin and, for GPT-2's tokenizer, gpt2_tokenizer.bin."""
    config, dtype = model.config, getattr(torch, job.dtype)
    tensors = to_external(model, transposed=False, biases=True)
    rows = config.known_vocab_size
    padded = -(-rows // ROWS) * ROWS
    sizes = (config.block_size, rows, config.n_layer, config.n_head, config.n_embd, padded)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(_header(MAGIC, VERSIONS[job.dtype], *sizes))
        for name, shape in _layout(config, padded).items():
            file.write(tensors[name].to(dtype).contiguous().view(torch.uint8).numpy().data)
            file.write(bytes((shape[0] - len(tensors[name])) * tensors[name][0].numel() * dtype.itemsize))
    if isinstance(job.tokenizer, GPT2Tokenizer):
        _write_tokens(job.tokenizer, folder / TOKENS)


def check(job: ExportRequest, folder: Path, reference: Reference) -> CheckResult:
    """Compares the exported model with the reference.

    Compares the exported weights, and the logits and greedy continuation that gptlab computes from them.
    """
    path, config = folder / WEIGHTS, job.source.model
    checks = [compare_tensors(_read(path, config), reference, version("numpy"))]
    model = meta_gpt(config.model_copy(update={"bias": True, "pad_vocab_to_multiple_of": 1}))
    state = {name: tensor.float() for name, tensor in _read(path, config)}
    state = fit_shapes(model, from_external(state, transposed=False))
    model.load_weights(state)
    with torch.no_grad():
        checks += compare_scores(model.eval(), reference, f"{version('gptlab')}, from the file", RELATIVE)
    no_package = "loading with llm.c, because it is not a Python package"
    return CheckResult(
        checks, [no_package, *omitted_tokenizer(job, (GPT2Tokenizer,), "llm.c only supports GPT-2's tokenizer")]
    )


def _layout(config: GPTConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Returns the names of the tensors, in the order of the file, with their shapes."""
    C = config.n_embd  # noqa: N806
    width = {"ln_1": C, "attn.c_attn": 3 * C, "attn.c_proj": C, "ln_2": C, "mlp.c_fc": 4 * C, "mlp.c_proj": C}
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (rows, C),
        "transformer.wpe.weight": (config.block_size, C),
    }
    for part in OF_BLOCKS:
        inner = () if part.startswith("ln") else (4 * C,) if part == "mlp.c_proj" else (C,)
        for kind, shape in (("weight", (width[part], *inner)), ("bias", (width[part],))):
            shapes |= {f"transformer.h.{layer}.{part}.{kind}": shape for layer in range(config.n_layer)}
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def _read(path: Path, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors as memory-mapped views of the file."""
    header = np.fromfile(path, dtype="<i4", count=HEADER)
    _, block, rows, layers, heads, width, padded = header[1:8].tolist()
    sizes = {"block_size": block, "n_layer": layers, "n_head": heads, "n_embd": width}
    kind = torch.float32 if header[1] == VERSIONS["float32"] else torch.bfloat16
    elements = torch.from_file(str(path), size=path.stat().st_size // kind.itemsize, dtype=kind)
    at = HEADER * 4 // kind.itemsize
    for name, shape in _layout(config.model_copy(update=sizes), padded).items():
        end = at + int(np.prod(shape))
        tensor = elements[at:end].view(shape)
        yield name, tensor[:rows] if name == "transformer.wte.weight" else tensor
        at = end


def _header(*numbers: int) -> bytes:
    header = np.zeros(HEADER, dtype="<i4")
    header[: len(numbers)] = numbers
    return header.tobytes()


def _write_tokens(tokenizer: GPT2Tokenizer, path: Path) -> None:
    """Writes the bytes of every token, each preceded by its length in one byte."""
    tokens = [tokenizer.to_bytes([i]) for i in range(tokenizer.vocab_size)]
    with path.open("wb") as file:
        file.write(_header(TOKENS_MAGIC, TOKENS_VERSION, len(tokens), tokenizer.end_of_text))
        file.writelines(bytes((len(token),)) + token for token in tokens)
