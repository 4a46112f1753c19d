"""suite=guards: what the guards of a run cost a training step. Imports no torch before it measures."""

from collections.abc import Iterator

from pydantic import PositiveInt
from rich import get_console

from gptlab.benchmarks.measuring import Result, ResultTable, relative_overhead, summarize_steps
from gptlab.config.base import FrozenConfig
from gptlab.model.config import GPTConfig
from gptlab.training.config import AdamWConfig


class GuardsBench(FrozenConfig):
    """The steps to measure; see conf/bench.yaml."""

    model: GPTConfig
    optimizer: AdamWConfig
    batch_size: PositiveInt
    steps: PositiveInt


def measure(bench: GuardsBench, rounds: int) -> Iterator[ResultTable]:
    """Measure one run a round, in which steps with and without guards take turns."""
    from gptlab.benchmarks.stepping import time_steps

    without, guarded = Result("", "without guards", []), Result("", "with guards", [])
    for number in range(rounds):
        with get_console().status(f"round {number + 1} of {rounds}"):
            plain, with_guards = map(
                summarize_steps,
                time_steps(bench.model, bench.optimizer, batch_size=bench.batch_size, steps=bench.steps),
            )
        without.samples.append(plain)
        guarded.samples.append(with_guards | relative_overhead(with_guards, plain))
    caption = (
        f"{bench.model.n_layer} layers of {bench.model.n_embd}, {bench.batch_size} sequences of "
        f"{bench.model.block_size} tokens, one process. Guards: the ranks' news of every step, the skipping of steps "
        f"without a finite gradient, loss spikes, the watchdog. Each figure is the median of {bench.steps} steps of "
        "its round; the two take turns every few steps of one run. On a machine that is busy with other things, the "
        "time of the CPU says more than that of the clock."
    )
    columns = ("CPU ms", "% more ms", "% more CPU ms")
    yield ResultTable("Training steps", caption, "steps/s", columns, [without, guarded])
