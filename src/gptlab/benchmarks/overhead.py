"""suite=overhead: the cost of the loop around training steps; suite=guards: that of the guards. Imports no torch."""

import json
from collections.abc import Iterator
from typing import Any

from rich import get_console

from gptlab.benchmarks.config import GuardsBench, LoopsOfRun, OverheadBench
from gptlab.benchmarks.measuring import Result, ResultTable, Sample, run_timed

LOOPS = "gptlab.benchmarks.training_loops"
COLUMNS = ("CPU ms", "% more ms", "% more CPU ms")
BUSY = "On a machine that is busy with other things, the time of the CPU says more than that of the clock."


def measure_overhead(bench: OverheadBench, cache: str, rounds: int) -> Iterator[ResultTable]:
    """Measures one run after the other; each round is a process of its own, in which the two loops take turns."""
    for title, run in (
        ("Small character model", bench.characters),
        ("Character model", bench.characters_large),
    ):
        yield _loops(title, run, cache, rounds)


def measure_guards(bench: GuardsBench, rounds: int) -> Iterator[ResultTable]:
    """Measures one process a round, in which steps with and without guards take turns."""
    todo = {"loop": "guards", "bench": bench.model_dump(mode="json")}
    without, guarded = _measure_rounds("Training steps", todo, ("without guards", "with guards"), rounds)
    caption = (
        f"{bench.model.n_layer} layers of {bench.model.n_embd}, {bench.batch_size} sequences of "
        f"{bench.model.block_size} tokens, one process. Guards: the ranks' news of every step, the skipping of steps "
        f"without a finite gradient, loss spikes, the watchdog. Each figure is the median of {bench.steps} steps of "
        f"its round; the two take turns every few steps of one run. {BUSY}"
    )
    yield ResultTable("Training steps", caption, "steps/s", COLUMNS, [without, guarded])


def _loops(title: str, run: LoopsOfRun, cache: str, rounds: int) -> ResultTable:
    todo = {"loop": "overhead", "arguments": [*run.arguments, f"data.cache_dir='{cache}'"], "turns": run.turns}
    bare, whole = _measure_rounds(title, todo, ("bare loop", "training run"), rounds)
    caption = (
        f"gptlab.train {' '.join(run.arguments)}: Lightning's loop with all that such a run has around its steps, a "
        "row of metrics every ten steps and the bar of a terminal included, evaluations and checkpoints not, beside a "
        f"loop of nothing but the same steps. Each figure is the median of {run.turns} turns of ten steps, which both "
        f"have alternately in one process. {BUSY}"
    )
    return ResultTable(f"{title}: the loop around a step", caption, "steps/s", COLUMNS, [bare, whole])


def _measure_rounds(title: str, todo: dict[str, Any], names: tuple[str, str], rounds: int) -> tuple[Result, Result]:
    """Runs ``training_loops`` once a round; returns the samples of its two ways, the plain one first."""
    plain, other = (Result("", name, []) for name in names)
    for number in range(rounds):
        with get_console().status(f"round {number + 1} of {rounds} · {title}"):
            samples: tuple[Sample, Sample] = json.loads(
                run_timed("-m", LOOPS, json.dumps(todo)).printed.splitlines()[-1]
            )
        plain.samples.append(samples[0])
        other.samples.append(samples[1])
    return plain, other
