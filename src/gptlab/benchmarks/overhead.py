"""suite=overhead: what the loop of a training run costs beside the steps themselves. Imports no torch."""

import json
from collections.abc import Iterator

from pydantic import PositiveInt
from rich import get_console

from gptlab.benchmarks.measuring import Result, ResultTable, run_timed
from gptlab.config.base import FrozenConfig

LOOPS = "gptlab.benchmarks.loops"


class LoopsOfRun(FrozenConfig):
    """A run to measure; see conf/bench.yaml.

    Attributes:
        arguments: Of ``gptlab.train``.
        turns: Of ten steps, which each of the two loops has.
    """

    arguments: list[str]
    turns: PositiveInt


class OverheadBench(FrozenConfig):
    """The runs to measure."""

    characters: LoopsOfRun
    characters_large: LoopsOfRun


def measure(bench: OverheadBench, cache: str, rounds: int) -> Iterator[ResultTable]:
    """Measure one run after the other; every round is a process of its own, in which the two loops take turns."""
    for title, run in (
        ("Small character model", bench.characters),
        ("Character model", bench.characters_large),
    ):
        yield _loops(title, run, cache, rounds)


def _loops(title: str, run: LoopsOfRun, cache: str, rounds: int) -> ResultTable:
    bare, whole = Result("", "bare loop", []), Result("", "training run", [])
    todo = json.dumps({"arguments": [*run.arguments, f"data.cache_dir='{cache}'"], "turns": run.turns})
    for number in range(rounds):
        with get_console().status(f"round {number + 1} of {rounds} · {title}"):
            measured = json.loads(run_timed("-m", LOOPS, todo).printed.splitlines()[-1])
        bare.samples.append(measured["bare"])
        whole.samples.append(measured["whole"])
    caption = (
        f"gptlab.train {' '.join(run.arguments)}: Lightning's loop with all that such a run has around its steps, a "
        "row of metrics every ten steps and the bar of a terminal included, evaluations and checkpoints not, beside a "
        f"loop of nothing but the same steps. Each figure is the median of {run.turns} turns of ten steps, which both "
        "have alternately in one process. On a machine that is busy with other things, the time of the CPU says more "
        "than that of the clock."
    )
    columns = ("CPU ms", "% more ms", "% more CPU ms")
    return ResultTable(f"{title}: the loop around a step", caption, "steps/s", columns, [bare, whole])
