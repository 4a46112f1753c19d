"""llama.cpp, run in this process by xllamacpp: what it makes of a file.

It is a server, which listens on this machine alone, at a port of its own choice. Only over that does it tell ids.
"""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptlab.exporters.certificate import (
    Check,
    compare_greedy,
    compare_logits,
    compare_texts,
    version,
)
from gptlab.exporters.reference import Reference
from gptlab.exporters.request import ExportRequest, comparison_texts

# Differences of logits. llama.cpp's GELU is a table of float16, and with weights in float16 so are the inputs of a
# product (ggml-cpu, GGML_GELU_FP16 and vec_dot_f16).
RELATIVE = {"float32": 2e-3, "float16": 5e-3}
TOP_TOKENS = 1000  # tokens of which it tells the probability
SURE = 1e9  # added to a logit: the token is drawn


def check_with_llama_cpp(job: ExportRequest, path: Path, reference: Reference) -> Iterator[Check]:
    """Compare log probabilities, a continuation by the likeliest token, and the tokenizer."""
    by, relative = f"llama.cpp of {version('xllamacpp')}", RELATIVE[job.dtype]
    server = _Server(path, context=job.source.model.block_size)
    of = f"log probabilities of the {min(TOP_TOKENS, job.source.model.known_vocab_size):,} likeliest tokens"
    yield compare_logits(_difference(server, job, reference), reference, by, relative, of=of)
    if tokens := len(reference.greedy.ids):
        ids = server.ask("completion", prompt=reference.beginning, n_predict=tokens, return_tokens=True)["tokens"]
        yield compare_greedy(ids, reference, by, relative)
    assert job.tokenizer is not None  # noqa: S101  (what check_format guarantees)
    texts = comparison_texts(job.tokenizer)
    theirs = [server.ask("tokenize", content=text)["tokens"] for text in texts]
    yield compare_texts(theirs, [job.tokenizer.encode(text).tolist() for text in texts], by)


def _difference(server: "_Server", job: ExportRequest, reference: Reference) -> float:
    """Find the largest difference of log probabilities near the end and in the middle of each prompt.

    It tells them of whole characters alone, so that one is made to be drawn; they are from before it is.
    """
    worst = 0.0
    whole = _whole_character(job)
    for prompt, logits in zip(reference.prompts, reference.logits, strict=True):
        for length in {len(prompt) // 2, len(prompt) - 1} - {0}:  # the block has to have room for what is drawn
            drawn = {"n_predict": 1, "n_probs": TOP_TOKENS, "logit_bias": [[whole, SURE]]}
            told = server.ask("completion", prompt=prompt[:length].tolist(), **drawn)["completion_probabilities"][0]
            ours = logits[length - 1].log_softmax(-1)
            theirs = {entry["id"]: entry["logprob"] for entry in told["top_logprobs"]}
            found = torch.tensor(list(theirs.values())) - ours[list(theirs)]
            worst = max(worst, found.abs().max().item())
    return worst


def _whole_character(job: ExportRequest) -> int:
    assert job.tokenizer is not None  # noqa: S101
    return int(job.tokenizer.encode("e")[0])


class _Server:
    """A model that llama.cpp has loaded, on the CPU; its cache is in float32, as ours is."""

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
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # to this machine, by no proxy

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Send values to one of its addresses."""
        if what == "completion":
            values |= {"temperature": 0, "cache_prompt": False}
        url = f"{self._server.listening_address}/{what}"
        request = urllib.request.Request(url, json.dumps(values).encode(), {"Content-Type": "application/json"})  # noqa: S310
        with self._open(request, timeout=600) as answer:
            told: dict[str, Any] = json.load(answer)
        return told
