"""What the settings of a run refuse by themselves."""

import pytest
from pydantic import ValidationError

from conftest import defaults
from gptlab.errors import UserError
from gptlab.training.config import TrainConfig, TrainerConfig

FSDP = defaults("trainer/auto.yaml") | {"devices": "auto", "strategy": "fsdp"}


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_matrices_are_split_by_one_strategy_alone(strategy):
    with pytest.raises(
        ValidationError, match="tensor_parallel=2 splits matrices over devices: it needs trainer=fsdp_tp"
    ):
        TrainerConfig(**FSDP | {"strategy": strategy, "tensor_parallel": 2})


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_what_is_not_sharded_is_not_offloaded(strategy):
    with pytest.raises(ValidationError, match=f"it needs trainer=fsdp or trainer=fsdp_tp, not strategy={strategy}"):
        TrainerConfig(**FSDP | {"strategy": strategy, "cpu_offload": True})


@pytest.mark.parametrize(
    ("parts", "devices", "nodes", "shares"), [(1, 8, 2, 16), (2, 8, 1, 4), (2, 8, 3, 12), (8, 8, 2, 2)]
)
def test_a_group_that_splits_a_model_reads_one_share_of_the_data(parts, devices, nodes, shares):
    config = TrainerConfig(**FSDP | {"strategy": "fsdp_tp", "tensor_parallel": parts})
    assert config.data_parallel(devices, nodes) == shares


def test_a_group_does_not_span_machines():
    config = TrainerConfig(**FSDP | {"strategy": "fsdp_tp", "tensor_parallel": 2})
    with pytest.raises(UserError, match="tensor_parallel=2 has to divide the devices of a machine, and there are 1 "):
        config.data_parallel(1, 2)


TRAIN = defaults("train.yaml")["train"]


@pytest.mark.parametrize("stages", [[(5, 4), (5, 8)], [(5, 8), (9, 8)], [(5, 8), (9, 4)], [(5, 12)], [(5, 24)]])
def test_batches_grow(stages):
    with pytest.raises(ValidationError, match="should name growing batches"):
        TrainConfig(**TRAIN | {"batch_schedule": stages})


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (2 * 4 * 32, 2), (2 * 4 * 32 + 1, 3), (24 * 32, 4), (25 * 32, 5)]
)
def test_a_length_in_tokens_is_that_of_growing_batches(tokens, steps):
    length = {"max_steps": None, "max_tokens": tokens, "batch_schedule": [(2, 4), (4, 8)]}
    assert TrainConfig(**TRAIN | length).steps(32) == steps
