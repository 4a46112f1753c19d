"""GGUF file for llama.cpp, with the layout of its convert_hf_to_gguf.py for a GPT2LMHeadModel.

The file is checked with llama.cpp, which xllamacpp runs in this process as a server on a free port of 127.0.0.1,
because token IDs are only available over HTTP.
"""

import json
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptlab.data.tokenizers.external import as_byte_level_bpe
from gptlab.errors import UserError
from gptlab.exporters.certificate import (
    Check,
    compare_greedy,
    compare_logits,
    compare_tensors,
    compare_texts,
    version,
)
from gptlab.exporters.reference import Reference
from gptlab.exporters.request import CheckResult, ExportRequest, comparison_texts, tensor_dtypes
from gptlab.model.config import NORM_EPSILON
from gptlab.model.external import to_external
from gptlab.model.gpt import GPT

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
ARCHITECTURE = "gpt2"
# llama.cpp requires at least one merge. This one never applies, because no merge produces the end-of-text token.
NO_MERGE = "<|endoftext|> <|endoftext|>"
# Relative tolerance of the logits. llama.cpp computes GELU with a float16 table and, for float16 weights, rounds the
# inputs of a matmul to float16 (ggml-cpu, GGML_GELU_FP16 and vec_dot_f16).
RELATIVE = {"float32": 2e-3, "float16": 5e-3}
TOP_TOKENS = 1000  # number of tokens whose probabilities llama.cpp returns
FORCING_BIAS = 1e9  # logit bias with which llama.cpp always samples a token


def write(model: GPT, job: ExportRequest, folder: Path) -> None:
    """Writes model.gguf: metadata and tokenizer, then the weights, one tensor at a time."""
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
    """Compares the exported file with the reference.

    Compares the weights as read by the gguf library and, if xllamacpp is installed, the logits, greedy continuation and
    tokenizer of llama.cpp.
    """
    checks = [compare_tensors(_read(folder / FILE, job, list(reference.tensors)), reference, version("gguf"))]
    if find_spec("xllamacpp") is None:
        return CheckResult(
            checks, ["logits, continuation and tokenizer, because xllamacpp (llama.cpp) is not installed"]
        )
    return CheckResult([*checks, *_by_llama_cpp(job, folder / FILE, reference)], [])


def _add_tokenizer(writer: "GGUFWriter", job: ExportRequest) -> None:
    from gguf import TokenType

    bpe = as_byte_level_bpe(job.tokenizer) if job.tokenizer is not None else None
    assert bpe is not None  # noqa: S101  (guaranteed by check_format)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(bpe.tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(bpe.tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair) for pair in bpe.merges] or [NO_MERGE])
    writer.add_bos_token_id(len(bpe.tokens) - 1)
    writer.add_eos_token_id(len(bpe.tokens) - 1)
    writer.add_add_bos_token(False)


def _names(layers: int) -> Callable[[str], str]:
    """Returns a function that maps names of ``to_external`` to the tensor names of the file."""
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, layers)

    def name_of(name: str) -> str:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:  # of an option that GPT-2 does not have
            raise UserError(f"format=gguf has no name for the tensor {name} of this model. Use format=onnx.")
        return found

    return name_of


def _read(path: Path, job: ExportRequest, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    import gguf

    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "c").tensors}
    name_of = _names(job.source.model.n_layer)
    for name in names:
        if (data := stored.pop(name_of(name), None)) is not None:
            yield name, torch.from_numpy(data)
    yield from ((name, torch.from_numpy(data)) for name, data in stored.items())


def _by_llama_cpp(job: ExportRequest, path: Path, reference: Reference) -> Iterator[Check]:
    """Compares log-probabilities, the greedy continuation and the tokenizer with llama.cpp."""
    by, relative = f"llama.cpp of {version('xllamacpp')}", RELATIVE[job.dtype]
    server = _Server(path, context=job.source.model.block_size)
    of = f"log-probabilities of the top {min(TOP_TOKENS, job.source.model.known_vocab_size):,} tokens"
    yield compare_logits(_difference(server, job, reference), reference, by, relative, of=of)
    if tokens := len(reference.greedy.ids):
        ids = server.ask("completion", prompt=reference.beginning, n_predict=tokens, return_tokens=True)["tokens"]
        yield compare_greedy(ids, reference, by, relative)
    assert job.tokenizer is not None  # noqa: S101  (guaranteed by check_format)
    texts = comparison_texts(job.tokenizer)
    theirs = [server.ask("tokenize", content=text)["tokens"] for text in texts]
    yield compare_texts(theirs, [job.tokenizer.encode(text).tolist() for text in texts], by)


def _difference(server: "_Server", job: ExportRequest, reference: Reference) -> float:
    """Returns the largest difference of log-probabilities near the end and in the middle of each prompt.

    llama.cpp returns them only if the sampled token completes a character. A logit bias forces such a token and does
    not affect the returned probabilities.
    """
    worst = 0.0
    forced = _complete_character(job)
    for prompt, logits in zip(reference.prompts, reference.logits, strict=True):
        for length in {len(prompt) // 2, len(prompt) - 1} - {0}:  # leaves room for the sampled token
            options = {"n_predict": 1, "n_probs": TOP_TOKENS, "logit_bias": [[forced, FORCING_BIAS]]}
            answer = server.ask("completion", prompt=prompt[:length].tolist(), **options)["completion_probabilities"][0]
            ours = logits[length - 1].log_softmax(-1)
            theirs = {entry["id"]: entry["logprob"] for entry in answer["top_logprobs"]}
            found = torch.tensor(list(theirs.values())) - ours[list(theirs)]
            worst = max(worst, found.abs().max().item())
    return worst


def _complete_character(job: ExportRequest) -> int:
    """Returns the ID of a token that is a complete character."""
    assert job.tokenizer is not None  # noqa: S101
    return int(job.tokenizer.encode("e")[0])


class _Server:
    """llama.cpp server with one model on the CPU, with a float32 KV cache as in gptlab."""

    def __init__(self, path: Path, context: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.hostnames, settings.port = ["127.0.0.1"], 0
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = 64
        settings.n_gpu_layers = settings.cache_ram_mib = settings.verbosity = 0
        settings.warmup = settings.fit_params = settings.ui = settings.endpoint_slots = False
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for threads in (settings.cpuparams, settings.cpuparams_batch):
            threads.n_threads = torch.get_num_threads()
        self._server = xllamacpp.Server(settings)
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # ignores proxy settings

    def ask(self, endpoint: str, **values: Any) -> dict[str, Any]:
        """Posts values to an endpoint and returns its response."""
        if endpoint == "completion":
            values |= {"temperature": 0, "cache_prompt": False}
        url = f"{self._server.listening_address}/{endpoint}"
        request = urllib.request.Request(url, json.dumps(values).encode(), {"Content-Type": "application/json"})  # noqa: S310
        with self._open(request, timeout=600) as response:
            answer: dict[str, Any] = json.load(response)
        return answer
