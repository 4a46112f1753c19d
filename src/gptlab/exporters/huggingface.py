"""Hugging Face model directory, which transformers' ``from_pretrained`` loads."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.data.tokenizers.external import CONVERTIBLE, to_huggingface
from gptlab.exporters.certificate import (
    Check,
    compare_greedy,
    compare_logits,
    compare_tensors,
    compare_texts,
    version,
)
from gptlab.exporters.reference import Reference
from gptlab.exporters.request import CheckResult, ExportRequest, comparison_texts, omitted_tokenizer, tensor_dtypes
from gptlab.model.config import NORM_EPSILON, GPTConfig
from gptlab.model.external import CONV1D, to_external
from gptlab.model.gpt import GPT
from gptlab.pretrained.external import DESCRIPTION, WEIGHTS, open_safetensors
from gptlab.training.checkpoints.safetensors_file import write_safetensors

GENERATION = "generation_config.json"
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
RELATIVE = 2e-5  # relative tolerance of the logits: both programs compute in float32


def write(model: GPT, job: ExportRequest, folder: Path) -> None:
    """Writes config.json, model.safetensors, generation_config.json and the tokenizer files."""
    end = job.end_of_text
    files: dict[str, Any] = {
        DESCRIPTION: _description(model.config, end, job.dtype),
        GENERATION: {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end},
    }
    if isinstance(job.tokenizer, CONVERTIBLE):
        files |= to_huggingface(job.tokenizer, model.config.block_size)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = to_external(model, transposed=True, biases=True)
    write_safetensors(tensors, tensor_dtypes(job, tensors), folder / WEIGHTS)


def check(job: ExportRequest, folder: Path, reference: Reference) -> CheckResult:
    """Compares the exported files with the reference.

    Compares the weights as read by safetensors and, if transformers is installed, the logits, greedy continuation and
    tokenizer of transformers.
    """
    checks = [compare_tensors(_read(folder), reference, version("safetensors"))]
    if find_spec("transformers") is None:
        return CheckResult(checks, ["logits and continuation, because transformers is not installed"])
    unchecked = omitted_tokenizer(job, CONVERTIBLE, "transformers cannot load a custom tokenizer")
    return CheckResult([*checks, *_by_transformers(job, folder, reference)], unchecked)


def _description(model: GPTConfig, end_of_text: int | None, dtype: str) -> dict[str, Any]:
    """Returns the GPT2Config of transformers. n_ctx is required by llama.cpp's converter."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_inner": None,
        "activation_function": ACTIVATIONS[str(model.activation)],
        "layer_norm_epsilon": NORM_EPSILON,
        "tie_word_embeddings": model.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **{f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")},
        "scale_attn_weights": True,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    with open_safetensors(folder / WEIGHTS, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (no mapping)
            tensor = tensors.get_tensor(name)
            yield name, tensor.transpose(0, -1) if CONV1D.search(name) else tensor


@torch.no_grad()
def _by_transformers(job: ExportRequest, folder: Path, reference: Reference) -> Iterator[Check]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    by = version("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    difference = (theirs(reference.prompts).logits - reference.logits).abs().max().item()
    yield compare_logits(difference, reference, by, RELATIVE)
    tokens, beginning = len(reference.greedy.ids), torch.tensor([reference.beginning])
    if tokens:
        mask = torch.ones_like(beginning)
        more = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0, "use_cache": True}
        ids = theirs.generate(beginning, attention_mask=mask, **more)[0, len(reference.beginning) :].tolist()
        yield compare_greedy(ids, reference, by, RELATIVE)
    if isinstance(job.tokenizer, CONVERTIBLE):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        texts = comparison_texts(job.tokenizer)
        ours = [job.tokenizer.encode(text).tolist() for text in texts]
        theirs_ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
        yield compare_texts(theirs_ids, ours, by)
