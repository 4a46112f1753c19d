"""A sweep as plain data for the page: its question, its answers, and the trials that left no run."""

import json
from pathlib import Path
from typing import Any

from gptlab.experiments.records.runs import CONFIG
from gptlab.experiments.records.sweeps import Sweep, load_trials

ANSWERS, SCALING = "answers.json", "scaling.json"
LAW = ("E", "A", "B", "alpha", "beta")  # L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)


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
        "scaling": _scaling(_found(directory / SCALING, problems)),
    }


def _answers(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Keep what is said, and a table of plain values.

    A row may be any {"column": value}; one with "settings", as the answers of sweeps have it, is told in fewer columns.
    """
    if found is None:
        return None
    rows = [row for row in found.get("rows") or () if isinstance(row, dict)]
    if rows and all(isinstance(row.get("settings"), dict) for row in rows):
        rows = [_told(row, str(found.get("metric") or "mean")) for row in rows]
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    table = [[_plain(row.get(column)) for column in columns] for row in rows]
    notes = [str(note) for note in found.get("notes") or ()]
    return {"answer": str(found.get("answer") or ""), "columns": columns, "rows": table, "notes": notes}


def _told(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """Tell a point of a sweep as the table in the terminal does."""
    counts = {name: row[name] for name in ("failed", "pruned", "unfinished") if row.get(name)}
    return {
        **row["settings"],
        "seeds": row.get("n"),
        metric: _with_error(row.get("mean"), row.get("se")),
        "difference": _with_error(row.get("difference"), row.get("difference_se")),
        "verdict": row.get("verdict"),
        **counts,
        "tokens": row.get("tokens"),
    }


def _with_error(value: Any, error: Any) -> str | None:
    if not isinstance(value, int | float):
        return None
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, int | float) else f"{value:.4f}"


def _scaling(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Keep the coefficients of a scaling law, their intervals, and what is said of it."""
    if found is None:
        return None
    law = found.get("law") or ()
    numbers = [law.get(name) for name in LAW] if isinstance(law, dict) else list(law)
    is_whole = len(numbers) == len(LAW) and all(isinstance(number, int | float) for number in numbers)
    return {
        "law": dict(zip(LAW, numbers, strict=True)) if is_whole else None,
        "intervals": found.get("intervals") or {},
        "answer": str(found.get("answer") or ""),
    }


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
