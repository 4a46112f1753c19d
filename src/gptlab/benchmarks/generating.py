"""Texts from one process, timed: with a cache, and in nanoGPT's way.

python -m gptlab.benchmarks.generating <what to do, in JSON>
"""

import json
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import torch

from gptlab.benchmarks.generation import GenerateBench
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import Decoder, generate
from gptlab.model.generation.inference import (
    build_decoder,
    bytes_per_token,
    measure_memory_bandwidth,
    prepare_for_inference,
)
from gptlab.model.generation.sampler import row_seeds, sample_next_token, uniform_numbers
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt
from gptlab.training.devices import peak_memory

SAMPLING = SamplingConfig(temperature=0.8, top_k=200, top_p=None, min_p=None, repetition_penalty=1)
WARM = 4  # tokens


def main(todo: dict[str, Any]) -> dict[str, float]:
    """Make a network, write, and say how fast that was."""
    bench, rows = GenerateBench.model_validate(todo["bench"]), todo["rows"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_gpt(bench.model)
    model = prepare_for_inference(model, todo["precision"], device, int8=todo["int8"], packed=todo["packed"])
    if todo["cache"]:
        first, seconds = time_cached(model, bench, rows, build_decoder(model, compiled=todo["compiled"]), device)
    else:
        first, seconds = time_recomputed(model, bench, device)
    measured = {"tokens/s": rows / seconds, "ms to the first": 1e3 * first, "peak MB": peak_memory(device) / 1e6}
    if todo["cache"]:
        length = bench.prompt_tokens + bench.tokens // 2
        read = bytes_per_token(model, rows, length) / seconds
        bandwidth = measure_memory_bandwidth(device)
        measured |= {"GB/s": read / 1e9, "%": 100 * read / bandwidth, "memory GB/s": bandwidth / 1e9}
    return measured


def time_cached(
    model: GPT, bench: GenerateBench, rows: int, decoder: Decoder, device: torch.device
) -> tuple[float, float]:
    """Return the seconds to the first token, and the median of the steps after it, each of all rows together."""
    prompt = torch.arange(bench.prompt_tokens).tolist()
    seeds = row_seeds(0, rows)
    many = bench.tokens if decoder.bucket > 1 else WARM  # a compiled step has been compiled for all lengths
    for tokens in (many, bench.tokens):
        times = [time.perf_counter()]
        for ids in generate(
            model, [prompt] * rows, SAMPLING, seeds=seeds, max_new_tokens=tokens, decoder=decoder, device=device
        ):
            ids.tolist()  # as who shows the text
            times.append(time.perf_counter())
    steps = [later - earlier for earlier, later in pairwise(times)]
    return steps[0], statistics.median(steps[1:])


@torch.no_grad()
def time_recomputed(model: GPT, bench: GenerateBench, device: torch.device) -> tuple[float, float]:
    """Return the seconds of the first token, and the mean of later ones: each by a pass over all that came before."""
    times = []
    uniforms = uniform_numbers([0], bench.tokens)[0].to(device)
    for added in (0, 0, *range(0, bench.tokens, bench.recomputed_every)):
        idx = torch.arange(bench.prompt_tokens + added, device=device)[None]
        begun = time.perf_counter()
        sample_next_token(model(idx)[:, -1], None, uniforms[added : added + 1], SAMPLING).tolist()
        times.append(time.perf_counter() - begun)
    return times[1], sum(times[2:]) / len(times[2:])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
