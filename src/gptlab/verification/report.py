"""Report of proofs, as a table and as JSON. Imports no torch."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.panel import Panel
from rich.text import Text

from gptlab.config.schema import RunConfig
from gptlab.files import write_durably
from gptlab.tables import FittingTable, print_table
from gptlab.terminal import get_console
from gptlab.tracking.environment import ENVIRONMENT, record_environment

REPORT = "prove.json"
REPORT_MARK = '{\n  "passed": '  # beginning of the report
SIGNS = {True: Text("yes", "green"), False: Text("NO", "bold red"), None: Text("–")}


class ProofResult(NamedTuple):
    """Result of a proof.

    Attributes:
        name: Name of the proof.
        passed: Whether it passed, or None if it is not possible with this configuration or on this machine.
        what: Result in words.
        details: Details, as plain data.
    """

    name: str
    passed: bool | None
    what: str
    details: dict[str, Any]


def print_proofs(config: RunConfig, steps: int, proofs: list[ProofResult]) -> None:
    """Prints a table with a row per proof, and the last output of failed runs."""
    console = get_console()
    table = FittingTable()
    table.add_column("proof")
    table.add_column("passed")
    table.add_column(f"{steps} steps of {config.name}, {config.trainer.strategy}", wraps=True)
    for proof in proofs:
        table.add_row(proof.name, SIGNS[proof.passed], proof.what)
    print_table(table)
    for proof in proofs:
        if tail := proof.details.get("tail"):
            console.print(Panel(Text(tail), title=proof.name, title_align="left", box=box.ROUNDED))


def write_report(folder: Path, config: RunConfig, proofs: list[ProofResult]) -> Path:
    """Writes environment.json and prove.json, which includes the environment; returns the path of prove.json."""
    record_environment(folder)
    report: dict[str, Any] = {
        "passed": all_passed(proofs),
        "proofs": [proof._asdict() for proof in proofs],
        "config": config.model_dump(mode="json"),
        "environment": json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8")),
    }
    path = folder / REPORT
    write_durably(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return path


def all_passed(proofs: list[ProofResult]) -> bool:
    """Returns whether no proof has failed; proofs that are not possible do not count."""
    return all(proof.passed is not False for proof in proofs)
