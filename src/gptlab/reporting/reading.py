"""Reads the data of runs for the page. A run that cannot be read is reported and omitted."""

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from gptlab.errors import UserError, failure_reason
from gptlab.files import open_regular
from gptlab.model.config import LoRAConfig, flops_per_token, parameter_count
from gptlab.reporting.series import curves, round_number
from gptlab.tracking.environment import ENVIRONMENT
from gptlab.tracking.run_store.blow_up import describe_blow_up
from gptlab.tracking.run_store.runs import CONFIG, FORECAST, METRICS, SAMPLES, Run
from gptlab.tracking.run_store.state import STATE
from gptlab.tracking.run_store.sweeps import TRIAL, Trial, read_trial

MOST_SAMPLES, LONGEST_SAMPLE = 24, 6000  # maximum samples per run and characters per sample
FEWEST_POINTS, TOGETHER = 100, 30_000  # minimum limit of points per curve; points of one metric over all runs

Extreme = Literal["lowest", "highest"]


@dataclass
class RunEntry:
    """Data of one run.

    Attributes:
        run: The run and its directory.
        settings: Flattened configuration.
        shown: All other data for the page.
        environment: Machine, packages and commit.
        trial: Trial of a sweep that the run belongs to, if any.
        thinned: Whether a curve has fewer points than metrics.csv.
        problems: Messages about files that could not be read.
    """

    run: Run
    settings: dict[str, Any]
    shown: dict[str, Any]
    environment: dict[str, Any]
    trial: Trial | None
    thinned: bool
    problems: list[str] = field(default_factory=list)


class RunReader:
    """Reads runs, and reads a run again only when one of its files has changed.

    Args:
        points: Maximum number of points per curve; reduced if there are many runs.
        metric: Metric by which runs are compared.

    Attributes:
        which: Whether the lowest or the highest value of the metric is a run's best.
    """

    def __init__(self, points: int, metric: str) -> None:
        self.points, self.metric = points, metric
        self.which: Extreme = "lowest"
        self._known: dict[Path, tuple[Any, RunEntry | str]] = {}

    def read(self, directories: list[Path]) -> tuple[list[RunEntry], list[str]]:
        """Returns the runs that can be read, and messages about runs and files that cannot be read."""
        points = max(FEWEST_POINTS, min(self.points, TOGETHER // max(1, len(directories))))
        entries, problems = [], []
        for directory in directories:
            signature = (points, self.metric, self.which, *(_file_signatures(directory / name) for name in _FILES))
            if self._known.get(directory, (None, ""))[0] != signature:
                self._known[directory] = signature, _read(Run(directory), points, self.metric, self.which)
            entry = self._known[directory][1]
            if isinstance(entry, str):
                problems.append(entry)
            else:
                entry.shown["state"] = _state(entry)  # not cached: a process that ends abnormally changes no file
                entries.append(entry)
                problems += entry.problems + entry.run.damaged(STATE)
        return entries, problems


_FILES = (CONFIG, METRICS, ENVIRONMENT, FORECAST, SAMPLES, TRIAL)


def _file_signatures(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _read(run: Run, points: int, metric: str, which: Extreme) -> RunEntry | str:
    """Reads a run, or returns a message that says why it is omitted."""
    try:
        return _read_entry(run, points, metric, which)
    except UserError as error:
        return f"{run.name} is omitted: {error}"
    except Exception as error:  # any error: the other runs are shown
        return f"{run.name} is omitted: {run.directory} cannot be read: {failure_reason(error)}"


def _read_entry(run: Run, points: int, metric: str, which: Extreme) -> RunEntry:
    settings = {key: _simplify(value) for key, value in run.settings.items()}
    trial = read_trial(run)
    try:
        _check_metrics(run)
        series = curves(run.rows, points)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{run.directory / METRICS} cannot be read: {failure_reason(error)}") from None
    samples, problems = _samples(run)
    problems += run.damaged(CONFIG, METRICS, ENVIRONMENT, FORECAST)
    if not run.rows and (state := run.state) is not None and state.step > 0:
        problems.append(f"{run.name}: {run.directory / METRICS} has no rows, although the run is at step {state.step}")
    parameters, flops = _size(run)
    shown = {
        "name": run.name,
        "directory": str(run.directory),
        "parameters": parameters,
        "flops": flops,
        "rows": len(run.rows),
        "series": series,
        "best": _best(run, metric, which),
        "blew_up": describe_blow_up(run),
        "samples": samples,
        "forecast": run.forecast,
        "trial": trial and trial.number,
    }
    counts = Counter(name for row in run.rows if "step" in row for name in row)
    thinned = any(len(curve["value"]) < counts[name] for name, curve in series.items())
    without_rows = Run(run.directory)  # a new object, to free the cached rows of metrics.csv
    return RunEntry(without_rows, settings, shown, run.environment, trial, thinned, problems)


def _check_metrics(run: Run) -> None:
    """Checks that metrics.csv, if it exists and is not empty, has a column ``step``; raises UserError otherwise."""
    path = run.directory / METRICS
    if not path.exists():
        return
    with io.TextIOWrapper(io.BufferedReader(open_regular(path)), encoding="utf-8", newline="") as file:
        if file.read(1024).strip():
            file.seek(0)
            if "step" not in (csv.DictReader(file).fieldnames or ()):
                raise UserError(f"{path} cannot be read: its header has no column step")


def _simplify(value: Any) -> Any:
    """Returns strings, finite numbers (rounded) and None; other floats as strings, all other values as JSON."""
    if isinstance(value, float):
        return round_number(value) if round_number(value) is not None else str(value)
    return value if value is None or isinstance(value, str | int) else json.dumps(value, default=str)


def _state(entry: RunEntry) -> dict[str, Any] | None:
    state = entry.run.state
    if state is None:
        return {"state": entry.trial.state, "message": entry.trial.message} if entry.trial else None
    shown = state.model_dump(mode="json", exclude={"pid"})
    if entry.trial is not None and entry.trial.state == "pruned":  # recorded only in trial.json
        shown["state"] = "pruned"
    return shown


def _best(run: Run, metric: str, which: Extreme) -> dict[str, Any] | None:
    """Returns value, step and tokens of the row with the best value of the metric, or None if there is none."""
    value = run.value(metric, which)
    row = next((row for row in run.rows if value is not None and row.get(metric) == value), None)
    return row and {"value": round_number(row[metric]), "step": int(row["step"]), "tokens": int(row.get("tokens", 0))}


def _samples(run: Run) -> tuple[list[tuple[int, str]], list[str]]:
    samples, problems = run.samples()
    if len(samples) > MOST_SAMPLES:  # evenly spaced, including the first and the last
        last = len(samples) - 1
        samples = [samples[round(i * last / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
    shown = [(step, text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} …") for step, text in samples]
    return shown, problems


def _size(run: Run) -> tuple[int | None, int | None]:
    """Returns the number of parameters and FLOPs per token; None if the run does not determine them."""
    try:
        model = run.model
        if model.components:  # the formulas do not apply
            return run.forecast.get("parameters"), None
        lora = run.config.get("lora")
        return parameter_count(model), flops_per_token(model, lora and LoRAConfig.model_validate(lora))
    except (ValidationError, ValueError):
        return None, None
