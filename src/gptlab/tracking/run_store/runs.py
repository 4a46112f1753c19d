"""Finds and reads run directories. Imports no torch."""

import csv
import glob
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gptlab.config.stored import complete
from gptlab.errors import UserError, failure_reason, without_passwords
from gptlab.files import open_regular, read_regular
from gptlab.model.config import GPTConfig, read_model_config
from gptlab.parsing import parse_json, parse_yaml
from gptlab.tracking.environment import ENVIRONMENT
from gptlab.tracking.run_store.state import STATE, RunState, load_state, read_state
from gptlab.training.checkpoints.records import best_intact

CONFIG, METRICS, FORECAST = "config.yaml", "metrics.csv", "forecast.json"
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
TRUNCATED = "is truncated: its last line has no line break"

MetricsRow = dict[str, float]


class Run:
    """Run directory, whose files are read on demand.

    Args:
        directory: Run directory.

    Attributes:
        directory: Run directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __repr__(self) -> str:
        if (state := self.state) is None:
            return f"<run {self.directory}>"
        best = "" if state.best_val_loss is None else f", best val loss {state.best_val_loss:.4f}"
        return f"<run {self.directory}: {state.state} at step {state.step:,}{best}>"

    @property
    def name(self) -> str:
        """Name of the run: <name>/<time>, or <name>/<time>/<number> for a trial of a sweep."""
        parts = self.directory.absolute().parts
        return "/".join(parts[-3:] if parts[-1].isdigit() else parts[-2:])

    @cached_property
    def config(self) -> dict[str, Any]:
        """Resolved configuration as nested plain data; raises UserError if it cannot be read."""
        try:
            values = parse_yaml(read_regular(self.directory / CONFIG))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.directory / CONFIG} cannot be read: {failure_reason(error)}") from None
        if not isinstance(values, dict):
            raise UserError(f"{self.directory / CONFIG} is not the configuration of a run: it is not a mapping.")
        return values

    @property
    def model(self) -> GPTConfig:
        """Configuration of its model; raises ValueError (also as pydantic's ValidationError) if it has no valid one."""
        try:
            return read_model_config(self.config.get("model"))
        except ValueError:
            return read_model_config(complete(self.config)[0].get("model"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Flattened configuration, to be shown: {"optimizer.lr": 1e-3, ...}. Passwords in URLs are hidden."""
        return dict(flatten(without_passwords(self.config)))

    @property
    def state(self) -> RunState | None:
        """State of the run; None if it has no state.json."""
        return load_state(self.directory)

    @cached_property
    def rows(self) -> list[MetricsRow]:
        """Rows of metrics.csv, without empty values; raises UserError if it is not CSV in UTF-8."""
        try:
            content = open_regular(self.directory / METRICS)
            with io.TextIOWrapper(io.BufferedReader(content), encoding="utf-8", newline="") as file:
                return [_numbers(row) for row in read_csv(file)]
        except OSError:
            return []
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.directory / METRICS} cannot be read: {failure_reason(error)}.") from error

    @property
    def metrics(self) -> MetricsRow:
        """Last value of each metric, such as val/loss, and of step and tokens."""
        return {name: value for row in self.rows for name, value in row.items()}

    @property
    def best_checkpoint(self) -> Path | None:
        """Intact checkpoint with the lowest val loss, or the newest if none has one; None without checkpoints."""
        return best_intact(self.directory / CHECKPOINTS)

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Returns the steps at which a metric was recorded, and its values."""
        rows = [row for row in self.rows if metric in row and "step" in row]
        return [row["step"] for row in rows], [row[metric] for row in rows]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Content of environment.json, without passwords in URLs; empty if there is none."""
        return without_passwords(_json(self.directory / ENVIRONMENT))

    @cached_property
    def forecast(self) -> dict[str, Any]:
        """Content of forecast.json; empty if there is none."""
        return _json(self.directory / FORECAST)

    def samples(self) -> tuple[list[tuple[int, str]], list[str]]:
        """Returns samples as (step, text), sorted by step, and a message for each damaged file."""
        if (folder := self.directory / SAMPLES).is_symlink():  # it could show any text files of the user
            return [], [f"{self.name}: {folder} cannot be read: it is a link"]
        samples, problems = [], []
        for path in folder.glob("*.txt"):
            if (step := _step(path)) is None:
                continue
            try:
                text = read_regular(path)
            except (OSError, ValueError) as error:
                problems.append(f"{self.name}: {path} cannot be read: {failure_reason(error)}")
                continue
            samples.append((step, text))
            if not text.endswith("\n"):
                problems.append(f"{self.name}: {path} {TRUNCATED}")
        return sorted(samples), sorted(problems)

    def damaged(self, *names: str) -> list[str]:
        """Returns a message for each of these files that exists and cannot be read or is truncated."""
        found = ((self.directory / name, _defect(self.directory / name)) for name in names)
        return [f"{self.name}: {path} {defect}" for path, defect in found if defect is not None]

    def value(self, metric: str = "val/loss", which: Literal["lowest", "highest", "last"] = "lowest") -> float | None:
        """Returns the lowest, the highest or the last finite value of a metric; None if there is none."""
        values = [value for value in self.series(metric)[1] if math.isfinite(value)]
        if not values:
            return None
        return values[-1] if which == "last" else min(values) if which == "lowest" else max(values)


def find_runs(patterns: str | Sequence[str]) -> list[Run]:
    """Finds runs: directories with a config.yaml, or with a state.json if the config.yaml has been lost.

    Args:
        patterns: A run directory, a directory with runs up to three levels below it, or a glob of these; or several.

    Returns:
        The runs, without duplicates; trials of a sweep are sorted by number.

    Raises:
        UserError: There are no runs at one of the patterns.
    """
    directories: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        named = Path(pattern).expanduser()  # its name may have characters of globs
        paths = [named] if named.exists() else sorted(map(Path, glob.glob(str(named))))  # noqa: PTH207  (absolute paths, too)
        found = [run for path in paths for run in _runs_below(path)]
        if not found:
            problem = f"no run directory (with a {CONFIG}) in it or below" if paths else "it does not exist"
            raise UserError(f"No runs found at runs={pattern}: {problem} (working directory: {Path.cwd()}).")
        directories |= dict.fromkeys(found)
    return [Run(directory) for directory in directories]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of the leaves of nested dictionaries; an empty dictionary is a leaf."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _runs_below(folder: Path) -> list[Path]:
    if (folder / CONFIG).is_file() or (folder / STATE).is_file():
        return [folder]
    names = (f"{below}{name}" for below in ("*/", "*/*/", "*/*/*/") for name in (CONFIG, STATE))
    return sorted({path.parent for name in names for path in folder.glob(name)}, key=_sort_key)


def _sort_key(directory: Path) -> list[tuple[int, int, str]]:
    """Returns a sort key that sorts the trials of a sweep by number: 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in directory.parts]


def read_csv(file: Iterable[str]) -> Iterator[dict[Any, Any]]:
    """Yields the rows of a CSV file as ``csv.DictReader``, but without empty values.

    DictReader would add a value for each column that a row does not have: a file with many columns and many short rows
    would take quadratic time and memory. A last line without a line break is unfinished and left out.
    """
    reader = csv.reader(line for line in file if line.endswith("\n"))
    header = next(reader, [])
    for row in filter(None, reader):
        values: dict[Any, Any] = {name: value for name, value in zip(header, row, strict=False) if value}
        yield values | {None: row[len(header) :]} if len(row) > len(header) else values


def _numbers(row: dict[Any, Any]) -> MetricsRow:
    numbers: MetricsRow = {}
    for key, value in row.items():
        try:
            if value:
                numbers[key] = float(value)
        except (TypeError, ValueError):  # a row that is currently being written
            continue
    return numbers


def _json(path: Path) -> dict[str, Any]:
    try:
        return _read_json(path)
    except (OSError, ValueError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    values = parse_json(read_regular(path))
    if not isinstance(values, dict):
        raise ValueError("it is not a mapping")
    return values


def _defect(path: Path) -> str | None:
    """Describes why a file of a run cannot be read, or that it is truncated; None if it is intact or missing."""
    try:
        if path.name == STATE:
            read_state(path.parent)
        elif path.suffix == ".json":
            _read_json(path)
        else:
            with open_regular(path) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1))
                return TRUNCATED if size and file.read(1) != b"\n" else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"cannot be read: {failure_reason(error)}"
    return None


def _step(path: Path) -> int | None:
    digits = "".join(character for character in path.stem if character.isdecimal())
    return int(digits) if digits else None
