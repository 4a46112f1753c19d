"""Common functions of the suites: alternating measurements, medians with their range, tables and a JSON file."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

from gptlab.errors import UserError
from gptlab.files import write_durably
from gptlab.tables import FittingTable, print_table
from gptlab.terminal import get_console

Sample = dict[str, float]  # results of one measurement, by name (with unit)
# headings of measures whose names in the JSON file are not clear
HEADINGS = {
    "% more ms": "ms, % more",
    "% more CPU ms": "CPU ms, % more",
    "%": "% of bandwidth",
    "ms to the first": "ms to first token",
    "inside": "seconds without start-up",
    "steps to it": "steps to target",
    "s to it": "seconds to target",
    "MB": "memory MB",
    "memory ratio": "ratio",
    "checkpoint ratio": "ratio",
    "time ratio": "ratio",
}


class StepTime(NamedTuple):
    """Duration of a step in seconds: wall time, and CPU time of all cores."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Self:
        """Returns the current time of both clocks."""
        return cls(time.perf_counter(), time.process_time())


def summarize_steps(steps: Iterable[StepTime]) -> Sample:
    """Returns the medians of several steps."""
    wall, cpu = (statistics.median(times) for times in zip(*steps, strict=True))
    return {"steps/s": 1 / wall, "ms": 1e3 * wall, "CPU ms": 1e3 * cpu}


def relative_overhead(sample: Sample, plain: Sample) -> Sample:
    """Returns the additional time of a step compared with a plain step, in percent."""
    return {f"% more {unit}": 100 * (sample[unit] / plain[unit] - 1) for unit in ("ms", "CPU ms")}


class Variant(NamedTuple):
    """Variant of a task: a row of a table.

    Attributes:
        group: Group of variants with the same task; the first variant of a group is its baseline.
        name: Name in the table.
        measure: Function that takes the number of the round and measures the variant once.
    """

    group: str
    name: str
    measure: Callable[[int], Sample]


class Result(NamedTuple):
    """Samples of a variant, one per round."""

    group: str
    name: str
    samples: list[Sample]

    def measures(self) -> list[str]:
        """Returns the names of the measures that every sample has."""
        return [measure for measure in self.samples[0] if all(measure in sample for sample in self.samples)]

    def median(self, measure: str) -> float:
        """Returns the median of a measure over the rounds."""
        return statistics.median(self._values(measure))

    def shown(self, measure: str, *, spread: bool = False) -> str:
        """Formats the median of a measure, optionally with its range; a dash if a sample does not have it."""
        if measure not in self.measures():
            return "–"
        median, values = self.median(measure), self._values(measure)
        digits = 0 if median >= 1000 else 1 if median >= 10 else 2
        width = f" ({min(values):,.{digits}f}–{max(values):,.{digits}f})" if spread else ""
        return f"{median:,.{digits}f}{width}"

    def _values(self, measure: str) -> list[float]:
        return [sample[measure] for sample in self.samples]


class ResultTable(NamedTuple):
    """Table of results.

    Attributes:
        title: Title of the table.
        caption: Description of the measurement.
        metric: Measure that the ratios compare.
        others: Other measures in the table.
        rows: Results, in the order of their groups.
        compared: Whether each row is compared with the first one of its group.
    """

    title: str
    caption: str
    metric: str
    others: tuple[str, ...]
    rows: list[Result]
    compared: bool = True

    def ratio(self, row: Result) -> float:
        """Returns the median of a row divided by the median of the baseline of its group."""
        baseline = next(other for other in self.rows if other.group == row.group)
        return row.median(self.metric) / baseline.median(self.metric)

    def record(self) -> dict[str, Any]:
        """Returns the table as plain data."""
        rows = [
            {
                "group": row.group,
                "name": row.name,
                **({"ratio": self.ratio(row)} if self.compared else {}),
                "medians": {measure: row.median(measure) for measure in row.measures()},
                "samples": row.samples,
            }
            for row in self.rows
        ]
        return {"title": self.title, "caption": self.caption, "metric": self.metric, "rows": rows}


def measure_in_turns(variants: Iterable[Variant], rounds: int) -> list[Result]:
    """Measures every variant once per round, so that a temporary slowdown of the machine affects all variants."""
    rows = [(variant, Result(variant.group, variant.name, [])) for variant in variants]
    for number in range(rounds):
        for variant, row in rows:
            status = f"round {number + 1} of {rounds} · {row.group} {row.name}"
            with get_console().status(status):
                row.samples.append(variant.measure(number))
    return [row for _, row in rows]


class TimedRun(NamedTuple):
    """Process that has ended: its duration in seconds and its standard output."""

    seconds: float
    printed: str


def run_timed(*arguments: str, environment: dict[str, str] | None = None, folder: Path | None = None) -> TimedRun:
    """Runs Python in a new process and measures its duration.

    Args:
        *arguments: Arguments of the interpreter.
        environment: Environment variables, or None for those of this process.
        folder: Working directory, or None for that of this process.

    Raises:
        UserError: The process failed. The message contains its error message.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
        errors="replace",
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        reason = _failure_message(done.stderr)
        raise UserError(f"python {' '.join(arguments)[:200]} failed with exit code {done.returncode}{reason}")
    return TimedRun(seconds, done.stdout)


def _failure_message(output: str) -> str:
    """Returns the error message at the end of a process's error output, without a traceback; "" if there is none."""
    lines = output.strip().splitlines()
    if not lines:
        return "."
    own = [number for number, line in enumerate(lines) if line.startswith("gptlab: ")]  # may have further lines
    return ":\n" + "\n".join(lines[own[-1] :] if own else lines[-1:])


def print_result_table(part: ResultTable) -> None:
    """Prints a table of results."""
    get_console().print(
        f"[bold]{part.title}[/bold]\n{part.caption} Values are medians{' (range)' * part.compared}.", highlight=False
    )
    table = FittingTable(see_also="The JSON file has all columns.")
    table.add_column()
    table.add_column(HEADINGS.get(part.metric, part.metric), "right")
    if part.compared:
        table.add_column("ratio", "right")
    for number, column in enumerate(part.others):
        table.add_column(HEADINGS.get(column, column), "right", drop_order=len(part.others) - number)
    group = ""
    for row in part.rows:
        if row.group != group:
            table.add_section()
            table.add_row(group := row.group)
        cells = [row.shown(part.metric, spread=part.compared), *[f"{part.ratio(row):.2f}"] * part.compared]
        table.add_row(("  " if group else "") + row.name, *cells, *(row.shown(measure) for measure in part.others))
    print_table(table)


REPORT_MARK = '{\n  "suite": '  # beginning of a report


def write_report(folder: Path, suite: str, rounds: int, parts: list[ResultTable]) -> Path:
    """Writes the tables to ``<folder>/<suite>.json`` and returns its path."""
    path = folder / f"{suite}.json"
    report = {"suite": suite, "rounds": rounds, "parts": [part.record() for part in parts]}
    write_durably(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return path
