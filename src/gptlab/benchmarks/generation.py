"""suite=generate: tokens per second of text generation, with a KV cache and by recomputation as in nanoGPT.

python -m gptlab.benchmarks.generation <task as JSON> measures one variant.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from gptlab.benchmarks.config import GenerateBench
from gptlab.benchmarks.measuring import ResultTable, Sample, Variant, measure_in_turns, run_timed
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
WARM = 4  # warm-up tokens
ONE, MANY = "one text", "texts in a batch"


def measure(bench: GenerateBench, rounds: int) -> Iterator[ResultTable]:
    """Measures all variants, each measurement in a separate process."""

    def variant(group: str, name: str, **changes: bool | int | str) -> Variant:
        defaults = {"cache": True, "precision": "float32", "int8": False, "packed": True, "compiled": False, "rows": 1}
        values = json.dumps({"bench": bench.model_dump(mode="json")} | defaults | changes)

        def run(_: int) -> Sample:
            return json.loads(run_timed("-m", "gptlab.benchmarks.generation", values).printed.splitlines()[-1])

        return Variant(group, name, run)

    fast = {"precision": "bfloat16"}
    many = f"{bench.batch_size} {MANY}"
    variants = [
        variant(ONE, "recomputed, float32", cache=False, packed=False),
        variant(ONE, "recomputed, bfloat16", cache=False, packed=False, **fast),
        variant(ONE, "float32, torch's linear", packed=False),
        variant(ONE, "float32"),
        variant(ONE, "bfloat16, torch's linear", packed=False, **fast),
        variant(ONE, "bfloat16", **fast),
        *([variant(ONE, "bfloat16, compiled", packed=False, compiled=True, **fast)] if bench.compiled else []),
        variant(ONE, "int8", int8=True, **fast),
        variant(many, "float32", rows=bench.batch_size),
        variant(many, "bfloat16", rows=bench.batch_size, **fast),
        variant(many, "int8", int8=True, rows=bench.batch_size, **fast),
    ]
    caption = (
        f"{bench.model.n_layer} layers of width {bench.model.n_embd}, random weights; {bench.tokens} tokens after a "
        f"prompt of {bench.prompt_tokens}, sampled with temperature 0.8 and top_k 200 in a new process, after a "
        "warm-up. Tokens/s: from the median time per token. GB/s: weights and KV cache read per second. % of "
        "bandwidth: relative to the bandwidth at which the same process sums a large tensor. Recomputed: without a KV "
        f"cache, as in nanoGPT, timed once every {bench.recomputed_every} tokens. Peak MB: peak memory of the "
        "process, including the creation of the model in float32."
    )
    columns = ("GB/s", "%", "ms to the first", "peak MB")
    yield ResultTable("Generation", caption, "tokens/s", columns, measure_in_turns(variants, rounds))


def main(task: dict[str, Any]) -> dict[str, float]:
    """Builds a model with random weights and measures one variant of generation."""
    bench, rows = GenerateBench.model_validate(task["bench"]), task["rows"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_gpt(bench.model)
    model = prepare_for_inference(model, task["precision"], device, int8=task["int8"], packed=task["packed"])
    if task["cache"]:
        first, seconds = time_cached(model, bench, rows, build_decoder(model, compiled=task["compiled"]), device)
    else:
        first, seconds = time_recomputed(model, bench, device)
    measured = {"tokens/s": rows / seconds, "ms to the first": 1e3 * first, "peak MB": peak_memory(device) / 1e6}
    if task["cache"]:
        length = bench.prompt_tokens + bench.tokens // 2
        read = bytes_per_token(model, rows, length) / seconds
        bandwidth = measure_memory_bandwidth(device)
        measured |= {"GB/s": read / 1e9, "%": 100 * read / bandwidth, "memory GB/s": bandwidth / 1e9}
    return measured


def time_cached(
    model: GPT, bench: GenerateBench, rows: int, decoder: Decoder, device: torch.device
) -> tuple[float, float]:
    """Returns the seconds to the first token, and the median seconds of later steps; a step adds a token per row."""
    prompt = torch.arange(bench.prompt_tokens).tolist()
    seeds = row_seeds(0, rows)
    many = bench.tokens if decoder.bucket > 1 else WARM  # compiles the decoder for all lengths
    for tokens in (many, bench.tokens):
        times = [time.perf_counter()]
        for ids in generate(
            model, [prompt] * rows, SAMPLING, seeds=seeds, max_new_tokens=tokens, decoder=decoder, device=device
        ):
            ids.tolist()  # waits for the token, like a program that prints it
            times.append(time.perf_counter())
    steps = [later - earlier for earlier, later in pairwise(times)]
    return steps[0], statistics.median(steps[1:])


@torch.no_grad()
def time_recomputed(model: GPT, bench: GenerateBench, device: torch.device) -> tuple[float, float]:
    """Returns the seconds of the first token, and the mean seconds of later tokens, without a KV cache."""
    times = []
    uniforms = uniform_numbers([0], bench.tokens)[0].to(device)
    for added in (0, 0, *range(0, bench.tokens, bench.recomputed_every)):
        idx = torch.arange(bench.prompt_tokens + added, device=device)[None]
        start = time.perf_counter()
        sample_next_token(model(idx)[:, -1], None, uniforms[added : added + 1], SAMPLING).tolist()
        times.append(time.perf_counter() - start)
    return times[1], sum(times[2:]) / len(times[2:])


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
