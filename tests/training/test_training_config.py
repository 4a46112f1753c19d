"""Validation of the training configuration."""

import pytest
from pydantic import ValidationError

from conftest import defaults
from gptlab.errors import UserError
from gptlab.training.config import TrainConfig, TrainerConfig

FSDP = defaults("trainer/auto.yaml") | {"devices": "auto", "strategy": "fsdp"}


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_tensor_parallelism_requires_fsdp_tp(strategy):
    with pytest.raises(ValidationError, match=rf"tensor_parallel=2 .* strategy={strategy} .* Use trainer=fsdp_tp"):
        TrainerConfig(**FSDP | {"strategy": strategy, "tensor_parallel": 2})


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_cpu_offload_requires_fsdp(strategy):
    with pytest.raises(ValidationError, match=rf"cpu_offload=true .* strategy={strategy} .* Use trainer=fsdp or"):
        TrainerConfig(**FSDP | {"strategy": strategy, "cpu_offload": True})


@pytest.mark.parametrize(
    ("parts", "devices", "nodes", "shares"), [(1, 8, 2, 16), (2, 8, 1, 4), (2, 8, 3, 12), (8, 8, 2, 2)]
)
def test_a_tensor_parallel_group_is_one_data_parallel_rank(parts, devices, nodes, shares):
    config = TrainerConfig(**FSDP | {"strategy": "fsdp_tp", "tensor_parallel": parts})
    assert config.data_parallel(devices, nodes) == shares


def test_a_tensor_parallel_group_does_not_span_nodes():
    config = TrainerConfig(**FSDP | {"strategy": "fsdp_tp", "tensor_parallel": 2})
    with pytest.raises(UserError, match=r"tensor_parallel=2 does not divide .* trainer\.devices=1"):
        config.data_parallel(1, 2)


TRAIN = defaults("train.yaml")["train"]


@pytest.mark.parametrize("stages", [[(5, 4), (5, 8)], [(5, 8), (9, 8)], [(5, 8), (9, 4)], [(5, 12)], [(5, 24)]])
def test_batch_schedule_must_increase(stages):
    with pytest.raises(ValidationError, match=r"batch_schedule=.* both values increase"):
        TrainConfig(**TRAIN | {"batch_schedule": stages})


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (2 * 4 * 32, 2), (2 * 4 * 32 + 1, 3), (24 * 32, 4), (25 * 32, 5)]
)
def test_max_tokens_accounts_for_the_batch_schedule(tokens, steps):
    length = {"max_steps": None, "max_tokens": tokens, "batch_schedule": [(2, 4), (4, 8)]}
    assert TrainConfig(**TRAIN | length).steps(32) == steps
