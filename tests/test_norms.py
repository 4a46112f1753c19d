"""Recorded weight norms and learning rates, compared with the checkpoint and the configuration."""

import pytest
import torch

from commands import assert_success, metrics, weights
from conftest import defaults

MUON = defaults("optimizer/muon.yaml")
DISTRIBUTED = [(f"trainer={name}", "trainer.devices=2") for name in ("ddp", "fsdp", "fsdp_tp")]


@pytest.mark.parametrize("trainer", [("trainer=cpu",), *(pytest.param(t, marks=pytest.mark.slow) for t in DISTRIBUTED)])
def test_the_weight_norm_is_that_of_the_saved_weights(user, trainer):
    assert_success(user.train(*trainer, "callbacks=checkpoint", "callbacks.checkpoint.sharded=false"))
    directory = user.only_run()
    found = weights(directory)
    found.pop("lm_head.weight", None)  # tied to wte
    tensors = [tensor.double() for tensor in found.values()]
    expected = torch.cat([tensor.flatten() for tensor in tensors]).norm().item()
    norms = metrics(directory, "weight_norm")
    assert list(norms) == [1, 2, 3, 4, 5, 6]
    assert norms[6] == pytest.approx(expected, rel=1e-6)
    assert len(set(norms.values())) == 6


@pytest.mark.slow
def test_the_learning_rate_of_every_muon_group_is_recorded(user):
    assert_success(user.train("optimizer=muon", "callbacks=none"))
    directory = user.only_run()
    rate = metrics(directory, "lr")
    assert metrics(directory, "lr/matrix") == rate
    for group, key in {"head": "head_lr", "embedding": "embedding_lr", "vector": "vector_lr"}.items():
        expected = {step: value * MUON[key] / MUON["lr"] for step, value in rate.items()}
        assert metrics(directory, f"lr/{group}") == pytest.approx(expected, rel=1e-12)
    assert len(set(rate.values())) == 6
