"""Checkpoints of earlier versions are read under today's names."""

import torch

from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.checkpoints.reading import RENAMED_CALLBACKS, read_state


def test_states_of_renamed_callbacks_are_found_under_their_new_names(tmp_path):
    states = {"Recorder": {"best": {}}, "Guard": {"bad_steps": 2}, "Checkpoints": {"evaluation_due": True}, "Other": {}}
    torch.save({"global_step": 3, "callbacks": states}, tmp_path / "state.pt")
    assert read_state(tmp_path)["callbacks"] == {
        "MetricsCallback": {"best": {}},
        "TrainingHealthMonitor": {"bad_steps": 2},
        "RunCheckpoint": {"evaluation_due": True},
        "Other": {},
    }


def test_new_names_are_those_under_which_lightning_looks_for_states():
    classes = (TrainingHealthMonitor, MetricsCallback, RunCheckpoint)
    keys = {kind.state_key.fget(object.__new__(kind)) for kind in classes}  # type: ignore[attr-defined]
    assert set(RENAMED_CALLBACKS.values()) == keys
