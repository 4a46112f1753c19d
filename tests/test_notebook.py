"""The notebook of the documentation runs unchanged on a run of a user."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from gptlab import load

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_on_the_newest_run_and_shows_its_numbers(user, runs):
    directory = runs.give(user, "quickstart", "callbacks=checkpoint")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(user.folder)}}).execute()
    printed = ["".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells]
    model, _ = load(str(directory))
    found = model.loss("def main(self):\n    return self")
    assert any(f"{found.loss:.3f} nats per token, {found.bits_per_byte:.3f} bits per byte" in text for text in printed)
    listing = next(text for text in printed if text.startswith("h.0.attn.weights"))
    assert [line.split()[0] for line in listing.splitlines()] == ["h.0.attn.weights", "h.1.attn.weights"]


def test_the_stored_notebook_was_executed_from_top_to_bottom_without_errors():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
