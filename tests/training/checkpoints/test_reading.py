"""Compatibility with checkpoints of earlier versions."""

import collections

import pytest
import torch
from torch import nn

from gptlab.errors import UserError
from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.checkpoints.reading import RENAMED_CALLBACKS, read_plain, read_state


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


@pytest.mark.parametrize("key", ["global_step", "epoch"])
@pytest.mark.parametrize("value", [2**126, 2**41, -1, True, 1.0, "1"])
def test_a_count_that_is_no_ordinary_integer_is_refused(tmp_path, key, value):
    torch.save({"global_step": 3, "callbacks": {}, "optimizer_states": [], key: value}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=rf"state\.pt is not a gptlab checkpoint: '{key}': "):
        read_state(tmp_path)


def test_integers_of_more_than_128_bits_are_refused(tmp_path):
    torch.save({"a": 2**128 - 1}, tmp_path / "a.pt")  # as in the state of numpy's PCG64
    assert read_plain(tmp_path / "a.pt") == {"a": 2**128 - 1}
    torch.save({"a": 2**128}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="it has an integer of more than 128 bits"):
        read_plain(tmp_path / "a.pt")


def test_values_of_all_permitted_types_are_read(tmp_path):
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.uint16]
    saved = {
        "tensors": [torch.ones(2, 3, dtype=dtype) for dtype in dtypes],
        "parameter": nn.Parameter(torch.ones(2)),
        "module": nn.Linear(2, 2).state_dict(),
        "plain": [None, True, 1, -(2**40), 2.5, "text", b"\xff\0", (1, (2,)), {1, 2}, {(1, "a"): 1, 2: 3, None: 4}],
        "torch": [torch.device("cpu"), torch.Size((2, 3)), torch.float32],
        "ordered": collections.OrderedDict(a=1),
        "generator": torch.get_rng_state(),
    }
    torch.save(saved, tmp_path / "a.pt")
    found = read_plain(tmp_path / "a.pt")
    assert str(found) == str(saved)
    assert found["module"]._metadata == saved["module"]._metadata
