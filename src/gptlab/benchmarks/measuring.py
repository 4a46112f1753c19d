"""What all suites share: variants measured in turns, medians with their spread, tables and a JSON file."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich import box, get_console
from rich.table import Table

from gptlab.data.shards.manifest import write_durably
from gptlab.errors import UserError

Sample = dict[str, float]  # what one measurement gave, by its name and unit


class StepTime(NamedTuple):
    """Seconds of one step: wall time, and CPU time of all cores."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Self:
        """Returns the current time of both clocks."""
        return cls(time.perf_counter(), time.process_time())


def summarize_steps(steps: Iterable[StepTime]) -> Sample:
    """Summarizes steps by their medians."""
    wall, cpu = (statistics.median(times) for times in zip(*steps, strict=True))
    return {"steps/s": 1 / wall, "ms": 1e3 * wall, "CPU ms": 1e3 * cpu}


def relative_overhead(sample: Sample, plain: Sample) -> Sample:
    """Returns how much longer steps take than plain ones, in percent."""
    return {f"% more {unit}": 100 * (sample[unit] / plain[unit] - 1) for unit in ("ms", "CPU ms")}


class Variant(NamedTuple):
    """One way to do the task of a table.

    Attributes:
        group: Variants of one group do the same task; the first of them is the baseline of the others.
        name: Its name in the table.
        measure: Runs it once, in the round of the given number.
    """

    group: str
    name: str
    measure: Callable[[int], Sample]


class Result(NamedTuple):
    """A variant and its samples, one per round."""

    group: str
    name: str
    samples: list[Sample]

    def measures(self) -> list[str]:
        """Returns the names of what every round has measured."""
        return [measure for measure in self.samples[0] if all(measure in sample for sample in self.samples)]

    def median(self, measure: str) -> float:
        """Returns the median of the rounds."""
        return statistics.median(self._values(measure))

    def shown(self, measure: str, *, spread: bool = False) -> str:
        """Formats the median, optionally with the minimum and maximum; a dash if it was not measured."""
        if measure not in self.measures():
            return "–"
        median, values = self.median(measure), self._values(measure)
        digits = 0 if median >= 1000 else 1 if median >= 10 else 2
        width = f" ({min(values):,.{digits}f}–{max(values):,.{digits}f})" if spread else ""
        return f"{median:,.{digits}f}{width}"

    def _values(self, measure: str) -> list[float]:
        return [sample[measure] for sample in self.samples]


class ResultTable(NamedTuple):
    """One table of results.

    Attributes:
        title: What is measured.
        caption: How it was measured.
        metric: The measure that the ratios compare; more is better.
        others: Other measures in the table.
        rows: The results, in the order of their groups.
    """

    title: str
    caption: str
    metric: str
    others: tuple[str, ...]
    rows: list[Result]

    def ratio(self, row: Result) -> float:
        """Returns the median of a row divided by that of its group's baseline."""
        baseline = next(other for other in self.rows if other.group == row.group)
        return row.median(self.metric) / baseline.median(self.metric)

    def record(self) -> dict[str, Any]:
        """Returns the table as plain data."""
        rows = [
            {
                "group": row.group,
                "name": row.name,
                "ratio": self.ratio(row),
                "medians": {measure: row.median(measure) for measure in row.measures()},
                "samples": row.samples,
            }
            for row in self.rows
        ]
        return {"title": self.title, "caption": self.caption, "metric": self.metric, "rows": rows}


def measure_in_turns(ways: Iterable[Variant], rounds: int) -> list[Result]:
    """Measures every variant once per round, so that a temporary slowdown of the machine affects all of them."""
    rows = [(way, Result(way.group, way.name, [])) for way in ways]
    for number in range(rounds):
        for way, row in rows:
            what = f"round {number + 1} of {rounds} · {row.group} {row.name}"
            with get_console().status(what):
                row.samples.append(way.measure(number))
    return [row for _, row in rows]


class TimedRun(NamedTuple):
    """A process that has ended: its seconds from start to end, and what it printed."""

    seconds: float
    printed: str


def run_timed(*arguments: str, environment: dict[str, str] | None = None, folder: Path | None = None) -> TimedRun:
    """Runs this interpreter in a process of its own.

    Raises:
        UserError: It failed; the message has the end of its output.
    """
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
        errors="replace",
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        told = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise UserError(f"python {' '.join(arguments)[:200]} failed with status {done.returncode}:\n{told}")
    return TimedRun(seconds, done.stdout)


def print_result_table(part: ResultTable) -> None:
    """Prints one table."""
    get_console().print(f"[bold]{part.title}[/bold]\n{part.caption} Medians (and from–to).", highlight=False)
    table = Table(box=box.SIMPLE)
    table.add_column(no_wrap=True)
    for column in (part.metric, "ratio", *part.others):
        table.add_column(column, justify="right", overflow="fold")
    group = ""
    for row in part.rows:
        if row.group != group:
            table.add_section()
            table.add_row(group := row.group)
        shown, others = row.shown(part.metric, spread=True), (row.shown(measure) for measure in part.others)
        table.add_row(("  " if group else "") + row.name, shown, f"{part.ratio(row):.2f}", *others)
    get_console().print(table)


def write_report(folder: Path, suite: str, rounds: int, parts: list[ResultTable]) -> Path:
    """Writes the tables to ``<folder>/<suite>.json``, and returns its path."""
    path = folder / f"{suite}.json"
    report = {"suite": suite, "rounds": rounds, "parts": [part.record() for part in parts]}
    write_durably(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return path
