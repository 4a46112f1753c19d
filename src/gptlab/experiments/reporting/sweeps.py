"""A sweep as plain data for the page: its question, its answers, and the trials that left no run."""

import json
from pathlib import Path
from typing import Any

from gptlab.experiments.records.runs import CONFIG
from gptlab.experiments.records.sweeps import Sweep, load_trials

ANSWERS, SCALING = "answers.json", "scaling.json"


def describe(directory: Path, sweep: Sweep, problems: list[str]) -> dict[str, Any]:
    """Return what the page says of a sweep; sentences about what cannot be read are added to ``problems``."""
    trials = load_trials(directory)
    return {
        "name": "/".join(directory.absolute().parts[-2:]),
        "directory": str(directory),
        **sweep.model_dump(mode="json", include={"question", "space", "search", "metric", "baseline"}),
        "trials": len(trials),
        "without_run": [
            trial.model_dump(mode="json", include={"number", "state", "message", "overrides"})
            for trial in trials
            if not (directory / str(trial.number) / CONFIG).is_file()
        ],
        "answers": _answers(_found(directory / ANSWERS, problems)),
        "scaling": _found(directory / SCALING, problems),
    }


def _answers(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Keep a sentence and a table of plain values: {"answer": "...", "rows": [{"column": value}]}."""
    if found is None:
        return None
    rows = [row for row in found.get("rows") or () if isinstance(row, dict)]
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    table = [[_plain(row.get(column)) for column in columns] for row in rows]
    return {"answer": str(found.get("answer") or ""), "columns": columns, "rows": table}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def _found(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Read what may stand beside sweep.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return None
    if not isinstance(values, dict):
        problems.append(f"{path} cannot be read: it holds no object")
        return None
    return values
