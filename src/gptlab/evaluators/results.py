"""The record of an evaluation: a table on the screen and a file beside the run. Imports no torch."""

import json
import math
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from rich import box, get_console
from rich.table import Table
from rich.text import Text

from gptlab.data.shards.manifest import write_durably
from gptlab.errors import UserError
from gptlab.pretrained.source import ModelSource

FOLDER = "evaluations"


class Reportable(Protocol):
    """See ``gptlab.evaluators.evaluator.EvalResult``."""

    @property
    def what(self) -> str: ...  # noqa: D102
    @property
    def values(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def rows(self) -> Sequence[tuple[str, ...]]: ...  # noqa: D102


def results_folder(out: str | None, source: ModelSource) -> Path:
    """Make the folder for results: the one named, or evaluations/ in the run, or here for a model that is no run.

    Raises:
        UserError: It cannot be made.
    """
    folder = Path(out).expanduser() if out else (source.path if source.is_run else Path()) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Results cannot be written into {folder}: {error}. Name another one: out=<folder>") from None
    return folder


def write_result(found: Reportable, facts: dict[str, Any], folder: Path) -> Path:
    """Write <what>_<time>.json: what was found and under what conditions."""
    named = f"{found.what}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    path = next(p for n in range(1, 10**6) if not (p := folder / f"{named}{f'-{n}' if n > 1 else ''}.json").exists())
    told = {"what": found.what, "gptlab": metadata.version("gptlab"), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_durably(path, json.dumps(_to_json(told | facts | found.values), indent=2) + "\n")
    return path


def print_result(found: Reportable) -> None:
    """Print the table."""
    headed = len(found.rows[0]) > 2
    table = Table(box=box.SIMPLE, show_header=headed)
    heading, *lines = found.rows if headed else [("", ""), *found.rows]
    for number, title in enumerate(heading):
        table.add_column(title, style=None if number else "bold")
    for cells in lines:
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    get_console().print(table)


def _to_json(value: Any) -> Any:
    """Make of the harness' values what JSON has; numbers that are none become null."""
    if isinstance(value, dict):
        return {str(key): _to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)
