"""Results of an evaluation: printed as a table and written as JSON to the run directory. Imports no torch."""

import json
import math
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.errors import UserError, failure_reason
from gptlab.files import check_no_link, write_durably
from gptlab.pretrained.source import ModelSource
from gptlab.tables import FittingTable, key_value_table, print_table

FOLDER = "evaluations"


class EvalResult(NamedTuple):
    """Result of an evaluation.

    Attributes:
        what: Kind of evaluation: "loss", "hellaswag" or "tasks".
        values: Content of the JSON file.
        metrics: Metrics by name, for a logger.
        rows: Cells of the printed table. If rows have more than two cells, the first row is the heading.
    """

    what: str
    values: dict[str, Any]
    metrics: dict[str, float]
    rows: Sequence[tuple[str, ...]]


def results_folder(out: str | None, source: ModelSource) -> Path:
    """Creates the directory of the results and returns its path.

    It is ``out`` if set, otherwise evaluations/ in the run directory, or in the working directory if the model is not a
    run.

    Raises:
        UserError: The directory cannot be created, or is a link in the run directory.
    """
    folder = Path(out).expanduser() if out else (source.path if source.is_run else Path()) / FOLDER
    if source.is_run and not out:
        check_no_link(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Results cannot be written to {folder}: {failure_reason(error)}. Choose another directory with out=<dir>."
        ) from None
    return folder


def write_result(result: EvalResult, conditions: dict[str, Any], folder: Path) -> Path:
    """Writes a result and the conditions of the evaluation to <what>_<time>.json, and returns its path."""
    stem = f"{result.what}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    path = next(p for n in range(1, 10**6) if not (p := folder / f"{stem}{f'-{n}' if n > 1 else ''}.json").exists())
    header = {"what": result.what, "gptlab": metadata.version("gptlab"), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_durably(path, json.dumps(_to_json(header | conditions | result.values), indent=2) + "\n")
    return path


def print_result(result: EvalResult) -> None:
    """Prints the table of a result."""
    if len(result.rows[0]) == 2:
        print_table(key_value_table((name, value) for name, value in result.rows))
        return
    heading, *lines = result.rows
    table = FittingTable(see_also="The JSON file has all columns.")
    for number, title in enumerate(heading):
        order = len(heading) - number if number > 1 else None
        table.add_column(title, style="" if number else "bold", drop_order=order)
    for cells in lines:
        table.add_row(*cells)
    print_table(table)


def _to_json(value: Any) -> Any:
    """Converts values of the harness to JSON types. Non-finite numbers become null."""
    if isinstance(value, dict):
        return {str(key): _to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)
