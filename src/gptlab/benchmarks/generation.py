"""suite=generate: tokens a second of texts, with and without a cache. Imports no torch."""

import json
from collections.abc import Iterator

from pydantic import PositiveInt

from gptlab.benchmarks.measuring import ResultTable, Sample, Variant, measure_in_turns, run_timed
from gptlab.config.base import FrozenConfig
from gptlab.model.config import GPTConfig

ONE, MANY = "one text", "texts at once"


class GenerateBench(FrozenConfig):
    """The texts to write; see conf/bench.yaml."""

    model: GPTConfig
    prompt_tokens: PositiveInt
    tokens: PositiveInt
    batch_size: PositiveInt
    recomputed_every: PositiveInt
    compiled: bool


def measure(bench: GenerateBench, rounds: int) -> Iterator[ResultTable]:
    """Measure every way in processes of its own."""

    def way(group: str, name: str, **changes: bool | int | str) -> Variant:
        plain = {"cache": True, "precision": "float32", "int8": False, "packed": True, "compiled": False, "rows": 1}
        values = json.dumps({"bench": bench.model_dump(mode="json")} | plain | changes)

        def run(_: int) -> Sample:
            return json.loads(run_timed("-m", "gptlab.benchmarks.generating", values).printed.splitlines()[-1])

        return Variant(group, name, run)

    fast = {"precision": "bfloat16"}
    many = f"{bench.batch_size} {MANY}"
    ways = [
        way(ONE, "recomputed, float32", cache=False, packed=False),
        way(ONE, "recomputed, bfloat16", cache=False, packed=False, **fast),
        way(ONE, "float32, torch's linear", packed=False),
        way(ONE, "float32"),
        way(ONE, "bfloat16, torch's linear", packed=False, **fast),
        way(ONE, "bfloat16", **fast),
        *([way(ONE, "bfloat16, compiled", packed=False, compiled=True, **fast)] if bench.compiled else []),
        way(ONE, "int8", int8=True, **fast),
        way(many, "float32", rows=bench.batch_size),
        way(many, "bfloat16", rows=bench.batch_size, **fast),
        way(many, "int8", int8=True, rows=bench.batch_size, **fast),
    ]
    caption = (
        f"{bench.model.n_layer} layers of {bench.model.n_embd}, random weights; {bench.tokens} tokens after a prompt "
        f"of {bench.prompt_tokens}, drawn with temperature 0.8 and top_k 200, in a fresh process that has written "
        "a few before; the median of its tokens. GB/s: weights and cache that a token reads; %: of the speed at which "
        "the same process sums up a large tensor. Recomputed is nanoGPT's way, timed at every "
        f"{bench.recomputed_every}th token. Peak MB: of the process, the making of the network in float32 included."
    )
    columns = ("GB/s", "%", "ms to the first", "peak MB")
    yield ResultTable("Generation", caption, "tokens/s", columns, measure_in_turns(ways, rounds))
