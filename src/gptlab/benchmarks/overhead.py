"""suite=overhead: cost of the loop around training steps; suite=guards: cost of the health checks. Imports no torch."""

import json
from collections.abc import Iterator
from typing import Any

from gptlab.benchmarks.config import GuardsBench, OverheadBench, OverheadRun
from gptlab.benchmarks.measuring import Result, ResultTable, Sample, run_timed
from gptlab.terminal import get_console

LOOPS = "gptlab.benchmarks.training_loops"
COLUMNS = ("CPU ms", "% more ms", "% more CPU ms")
BUSY = "On a machine with other load, CPU time is more reliable than wall time."


def measure_overhead(bench: OverheadBench, cache: str, rounds: int) -> Iterator[ResultTable]:
    """Measures one run after the other. Each round is a new process, in which the two loops alternate."""
    for title, run in (
        ("Small character model", bench.characters),
        ("Character model", bench.characters_large),
    ):
        yield _loops(title, run, cache, rounds)


def measure_guards(bench: GuardsBench, rounds: int) -> Iterator[ResultTable]:
    """Measures training steps with and without health checks, which alternate in one process per round."""
    task = {"loop": "guards", "bench": bench.model_dump(mode="json")}
    without, guarded = _measure_rounds("Training steps", task, ("without health checks", "with health checks"), rounds)
    caption = (
        f"{bench.model.n_layer} layers of width {bench.model.n_embd}, {bench.batch_size} sequences of "
        f"{bench.model.block_size} tokens, one process. Health checks: synchronization of the ranks after every step, "
        "skipping of steps with non-finite gradients, detection of loss spikes, watchdog. Each sample is the median of "
        f"{bench.steps} steps; steps with and without health checks alternate within one run. {BUSY}"
    )
    yield ResultTable("Training steps", caption, "steps/s", COLUMNS, [without, guarded])


def _loops(title: str, run: OverheadRun, cache: str, rounds: int) -> ResultTable:
    task = {"loop": "overhead", "arguments": [*run.arguments, f"data.cache_dir='{cache}'"], "turns": run.turns}
    bare, whole = _measure_rounds(title, task, ("bare loop", "training run"), rounds)
    caption = (
        f"gptlab.train {' '.join(run.arguments)}: Lightning's loop with all callbacks, logging every ten steps and the "
        "progress bar, but without evaluations and checkpoints, compared with a bare loop of the same steps. Each "
        f"sample is the median of {run.turns} turns of ten steps; the two loops alternate in one process. {BUSY}"
    )
    return ResultTable(f"{title}: overhead of the training loop", caption, "steps/s", COLUMNS, [bare, whole])


def _measure_rounds(title: str, task: dict[str, Any], names: tuple[str, str], rounds: int) -> tuple[Result, Result]:
    """Runs ``training_loops`` once per round; returns the results of its two variants, the plain one first."""
    plain, other = (Result("", name, []) for name in names)
    for number in range(rounds):
        with get_console().status(f"round {number + 1} of {rounds} · {title}"):
            samples: tuple[Sample, Sample] = json.loads(
                run_timed("-m", LOOPS, json.dumps(task)).printed.splitlines()[-1]
            )
        plain.samples.append(samples[0])
        other.samples.append(samples[1])
    return plain, other
