"""Compatibility with checkpoints of earlier versions."""

import torch

from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.checkpoints.reading import RENAMED_CALLBACKS, read_state


def test_states_of_renamed_callbacks_have_their_new_names(tmp_path):
    states = {"Recorder": {"best": {}}, "Guard": {"bad_steps": 2}, "Checkpoints": {"evaluation_due": True}, "Other": {}}
    torch.save({"global_step": 3, "callbacks": states, "optimizer_states": []}, tmp_path / "state.pt")
    assert read_state(tmp_path)["callbacks"] == {
        "MetricsCallback": {"best": {}},
        "TrainingHealthMonitor": {"bad_steps": 2},
        "RunCheckpoint": {"evaluation_due": True},
        "Other": {},
    }


def test_new_names_are_lightning_s_state_keys():
    classes = (TrainingHealthMonitor, MetricsCallback, RunCheckpoint)
    keys = {kind.state_key.fget(object.__new__(kind)) for kind in classes}  # type: ignore[attr-defined]
    assert set(RENAMED_CALLBACKS.values()) == keys
