"""What the settings of a run refuse by themselves."""

import pytest
from pydantic import ValidationError

from conftest import defaults
from gptlab.errors import UserError
from gptlab.training.config import TrainerConfig

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
