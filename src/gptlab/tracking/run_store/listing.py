"""Lists runs: filters, sorts and formats them. Imports no torch."""

import csv
import io
import json
import operator
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from gptlab.errors import UserError, did_you_mean, failure_reason
from gptlab.tables import FittingTable
from gptlab.tracking.run_store.runs import CONFIG, Run
from gptlab.tracking.run_store.state import STATE
from gptlab.tracking.run_store.sweeps import read_trial

COLUMNS = ("run", "state", "step", "loss", "val_loss", "tokens_per_second", "left", "age")
HEADINGS = {"val_loss": "best val", "tokens_per_second": "tokens/s"}
STYLES = {"done": "green", "running": "cyan", "pruned": "yellow", "stopped": "yellow", "interrupted": "yellow"}
# columns that a narrow terminal omits, first to last; the columns that the user adds follow
DROP_ORDER = {"tokens_per_second": 1, "left": 2, "age": 3, "loss": 4, "step": 5, "val_loss": 6}
UNKNOWN = "?"  # state of runs without state.json

Line = dict[str, Any]
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    **{"<=": operator.le, ">=": operator.ge, "!=": operator.ne},
    **{"=": operator.eq, "<": operator.lt, ">": operator.gt},
}


class Condition(NamedTuple):
    """Condition on a run, such as model.n_layer>=6.

    Attributes:
        key: Config key or column.
        symbol: Operator, one of = != < <= > >=.
        value: Value to compare with.
    """

    key: str
    symbol: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses a condition; raises UserError if it is invalid."""
        found = re.fullmatch(r"\s*([A-Za-z_][\w./]*)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", text)
        if found is None:
            raise UserError(
                f"filter={text} is not valid. A condition is a key, one of {' '.join(_OPERATORS)} and a value, such as "
                "optimizer.lr>=1e-3. Separate several conditions by commas."
            )
        return cls(found[1], found[2], _value(found[3]))

    def holds(self, line: Line, settings: dict[str, Any]) -> bool:
        """Whether a run meets the condition.

        A run without the key meets only a condition with ``!=``. A value that cannot be compared does not meet it.

        Args:
            line: Columns of the run.
            settings: Flattened configuration of the run.
        """
        missing = object()
        there = line[self.key] if self.key in line else settings.get(self.key, missing)
        if there is missing:
            return self.symbol == "!="
        try:
            return _OPERATORS[self.symbol](there, self.value)
        except TypeError:
            return False


def split_unreadable(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Returns the runs that can be listed, and messages about the other runs and about damaged files."""
    readable, problems = [], []
    for run in runs:
        try:
            _line(run)
            readable.append(run)
            problems += run.damaged(CONFIG, STATE)
        except Exception as error:  # any error: the other runs are listed
            problems.append(f"{run.name} is omitted: {failure_reason(error)}")
    return readable, problems


def list_runs(runs: Sequence[Run], conditions: list[Condition], sort: str, *, descending: bool) -> list[Line]:
    """Returns a sorted list with one line per run that meets all conditions.

    Args:
        runs: Runs to list.
        conditions: Conditions that must all be met.
        sort: Column or config key to sort by; runs without a value come last.
        descending: Whether the largest value comes first.

    Raises:
        UserError: No run has the key ``sort`` or that of a condition.
    """
    everything = [(_line(run), run.settings) for run in runs]
    known = {key for line, settings in everything for key in (*line, *settings)}
    for key in (sort, *(condition.key for condition in conditions)):
        if key not in known:
            raise UserError(f"{key} is neither a column nor a config key of these runs.{did_you_mean(key, known)}")
    kept = [
        settings | line
        for line, settings in everything
        if all(condition.holds(line, settings) for condition in conditions)
    ]
    there = [line for line in kept if line.get(sort) is not None]
    there.sort(key=lambda line: _comparable(line[sort]), reverse=descending)
    return [*there, *(line for line in kept if line.get(sort) is None)]


def format_table(lines: list[Line], columns: Sequence[str], *, left_out: int) -> RenderableType:
    """Formats lines as a table; ``left_out`` is the number of runs omitted by the limit."""
    columns = [column for column in columns if column != "left" or any(line.get("left") is not None for line in lines)]
    table = FittingTable(see_also="format=csv has all columns.")
    for column in columns:
        justify: Literal["left", "right"] = "left" if column in ("run", "state") else "right"
        heading = HEADINGS.get(column, column.rpartition(".")[2])
        order = None if column in ("run", "state") else DROP_ORDER.get(column, len(DROP_ORDER) + 1)
        table.add_column(heading, justify, drop_order=order)
    for line in lines:
        table.add_row(*(_cell(column, line.get(column), line) for column in columns))
    return Group(table, Text(f"  and {left_out} more (limit)")) if left_out else table


def format_csv(lines: list[Line], columns: Sequence[str]) -> str:
    """Formats lines as CSV, with unformatted numbers."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def format_json(lines: list[Line], columns: Sequence[str]) -> str:
    """Formats lines as a JSON list of objects."""
    return json.dumps([{column: line.get(column) for column in columns} for line in lines], indent=1) + "\n"


def _line(run: Run) -> Line:
    state, settings = run.state, run.settings
    if state is None:
        steps, losses = run.series("train/loss")
        values = {
            "state": UNKNOWN,
            "step": int(steps[-1]) if steps else 0,
            "max_steps": settings.get("train.max_steps"),
            "loss": losses[-1] if losses else None,
            "val_loss": run.value(),
            "tokens_per_second": run.value("tokens_per_second", "last"),
            "left": None,
            "blew_up": False,
            "age": time.time() - run.directory.stat().st_mtime,
        }
    else:
        left = state.seconds_left if state.state == "running" else None
        values = {
            **{"state": state.state, "step": state.step, "max_steps": state.max_steps, "loss": state.loss},
            **{"val_loss": state.best_val_loss, "tokens_per_second": state.tokens_per_second},
            **{"left": left, "age": time.time() - state.updated, "blew_up": state.blew_up is not None},
        }
    trial = read_trial(run)
    return {"run": run.name, **values, "trial": trial and trial.number, "directory": str(run.directory)}


def _cell(column: str, value: Any, line: Line) -> Text:
    match column:
        case "state" if line.get("blew_up"):
            return Text(f"{value}, blew up", style="red")
        case "state":
            return Text(str(value), style=STYLES.get(value, "dim" if value == UNKNOWN else "red"))
        case "step" if line.get("max_steps"):
            return Text(f"{value:,}/{line['max_steps']:,}")
        case "left" | "age" if value is not None:
            return Text(_short(value))
        case "tokens_per_second" if value is not None:
            return Text(f"{value:,.0f}")
        case "loss" | "val_loss" if value is not None:
            return Text(f"{value:.4f}")
    return Text("" if value is None else f"{value:g}" if isinstance(value, float) else str(value))


def _short(seconds: float) -> str:
    """Formats a duration in its largest unit: 45s, 12m, 5h, 3d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _value(text: str) -> Any:
    """Parses a value as in the configuration; unlike in YAML 1.1, 1e-3 is a number."""
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text) if text else ""


def _comparable(value: Any) -> tuple[bool, Any]:
    """Returns a sort key that sorts numbers before text."""
    return (False, value) if isinstance(value, int | float) else (True, str(value))
