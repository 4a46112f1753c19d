"""Checks of finished commands, and readers of run directories."""

import csv
from pathlib import Path

import torch

from gptlab.training.checkpoints.reading import read_checkpoint

COMPARED = ("train/loss", "val/loss", "grad_norm", "lr", "tokens")


def metrics(directory: Path, name: str) -> dict[int, float]:
    """Returns a column of metrics.csv by step."""
    with (directory / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Returns the weights in the last checkpoint of a run, read independently of gptlab."""
    newest = sorted(directory.glob("checkpoints/step_*"))[-1]
    return torch.load(newest / "state.pt", weights_only=True)["state_dict"]


def assert_success(done) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def assert_config_error(done, message: str) -> None:
    """Checks that a command failed with this message and the exit code of config errors."""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def newest_state(directory: Path) -> dict:
    """Returns the contents of the last checkpoint of a run; shards are merged."""
    return read_checkpoint(sorted(directory.glob("checkpoints/step_*"))[-1])


def averages(directory: Path) -> dict[str, torch.Tensor]:
    """Returns the averaged weights in the last checkpoint of a run."""
    (optimizer,) = newest_state(directory)["optimizer_states"]
    return {name: moments["average"] for name, moments in optimizer["state"].items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Checks that two runs have the same rows, each once, and bit-identical weights and optimizer state."""
    for name in COMPARED:
        assert metrics(one, name) == metrics(other, name), name
    lines = [(directory / "metrics.csv").read_text().count("\n") for directory in (one, other)]
    assert lines[0] == lines[1]
    states = [newest_state(directory) for directory in (one, other)]
    assert states[0]["global_step"] == states[1]["global_step"]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    moments = [state["optimizer_states"][0]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys()
    for name in moments[0]:
        for moment, tensor in moments[0][name].items():
            assert torch.equal(tensor, moments[1][name][moment]), f"{name}.{moment}"
