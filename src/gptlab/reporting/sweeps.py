"""Data of a sweep for the page: question, results, and trials without a run."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from gptlab.errors import failure_reason
from gptlab.files import read_regular
from gptlab.sweeps.analysis.phrases import plus_minus
from gptlab.sweeps.analysis.scaling_report import SCALING, ScalingAnswer
from gptlab.sweeps.analysis.table import AnswerRow, analyze_sweep
from gptlab.tracking.run_store.runs import CONFIG
from gptlab.tracking.run_store.sweeps import Sweep, load_trials


def describe_sweep(directory: Path, sweep: Sweep, problems: list[str]) -> dict[str, Any]:
    """Returns the page's data on a sweep; appends messages about files that cannot be read to ``problems``."""
    trials = load_trials(directory)
    return {
        "name": "/".join(directory.absolute().parts[-2:]),
        "directory": str(directory),
        **sweep.model_dump(mode="json", include={"question", "space", "search", "metric", "direction", "baseline"}),
        "trials": len(trials),
        "without_run": [
            trial.model_dump(mode="json", include={"number", "state", "message", "overrides"})
            for trial in trials
            if not (directory / str(trial.number) / CONFIG).is_file()
        ],
        "answers": _answers(directory, "".join(trial.model_dump_json() for trial in trials)),
        "scaling": _scaling(directory / SCALING, problems),
    }


@lru_cache(maxsize=64)
def _answers(directory: Path, _trials: str) -> dict[str, Any]:
    """Returns the results of a sweep as a table, as in the terminal; cached until a trial changes."""
    found = analyze_sweep(directory)
    described = [_describe_row(row, found.metric) for row in found.rows]
    columns = list(dict.fromkeys(column for row in described for column in row))
    rows = [[row.get(column) for column in columns] for row in described]
    return {"answer": found.answer, "columns": columns, "rows": rows, "notes": found.notes}


def _describe_row(row: AnswerRow, metric: str) -> dict[str, Any]:
    """Returns the table row of one point of a sweep."""
    counts = {"failed": row.failed, "pruned": row.pruned, "unfinished": row.unfinished}
    return {
        **row.settings,
        "seeds": row.n,
        metric: _with_error(row.mean, row.se),
        "difference": _with_error(row.difference, row.difference_se),
        "verdict": row.verdict,
        **{name: count for name, count in counts.items() if count},
        "tokens": row.tokens,
    }


def _with_error(value: float | None, error: float | None) -> str | None:
    return None if value is None else plus_minus(value, error)


def _scaling(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Reads the scaling law fitted to a sweep over model sizes and tokens; returns None if there is no fit."""
    try:
        found = ScalingAnswer.model_validate_json(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {failure_reason(error)}")
        return None
    return found.model_dump(mode="json", include={"law", "intervals", "undetermined", "answer"})
