import pytest

from conftest import defaults
from gptlab.errors import UserError
from gptlab.training.batch_plan import BatchPlan, plan_batch
from gptlab.training.config import TrainConfig


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "plan"),
    [
        (480, 12, 8, BatchPlan(8, 12, 5)),
        (480, 12, 1, BatchPlan(1, 12, 40)),  # 40 micro-batches, as in nanoGPT
        (12, None, 1, BatchPlan(1, 12, 1)),
        (12, None, 2, BatchPlan(2, 6, 1)),
    ],
)
def test_accumulation_follows_from_the_global_batch_size(global_batch, micro_batch, world, plan):
    assert plan_batch(global_batch, micro_batch, world) == plan


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "nearest"),
    [(10, 4, 1, "8 and 12"), (480, 12, 7, "420 and 504"), (2, None, 3, "3"), (13, None, 4, "12 and 16")],
)
def test_an_indivisible_batch_size_raises_with_the_nearest_divisible_ones(global_batch, micro_batch, world, nearest):
    with pytest.raises(UserError, match=rf"train.global_batch_size={global_batch} .* valid values: {nearest}\."):
        plan_batch(global_batch, micro_batch, world)


def test_earlier_stages_have_the_same_accumulation():
    plan = plan_batch(24, 6, 2, [(10, 4), (20, 8)])
    assert plan == BatchPlan(2, 6, 2, ((10, 4), (20, 8)))
    assert [plan.stages.batch(step) for step in (0, 9, 10, 19, 20)] == [4, 4, 8, 8, 24]
    assert plan_batch(24, 6, 2).stages.sizes == [24]


def test_an_indivisible_batch_size_of_an_earlier_stage_raises():
    with pytest.raises(UserError, match=r"batch_schedule: batch size=10 is not divisible by 4 .* values: 8 and 12\."):
        plan_batch(24, 6, 2, [(5, 8), (7, 10)])


def test_past_stages_may_have_any_batch_size():
    plan = plan_batch(8, 2, 2, [(20, 4)], [(3, 7), (10, 24)])
    assert plan == BatchPlan(2, 2, 2, ((20, 4),), ((3, 7), (10, 24)))
    assert [plan.stages.batch(step) for step in (0, 2, 3, 9, 10, 19, 20)] == [7, 7, 24, 24, 4, 4, 8]
    assert [plan.stages.first(step) for step in (3, 10, 20, 21)] == [21, 189, 229, 237]
    assert plan.stages.steps(229) == 20
    assert plan.stages.sizes == [4, 8]


def test_the_batch_sizes_of_the_steps_before_a_checkpoint_are_kept():
    values = defaults("train.yaml")["train"] | {"batch_schedule": [[4, 2], [8, 6]], "global_batch_size": 12}
    train = TrainConfig(**values)
    assert [train.batches_until(step) for step in (3, 4, 5, 8, 20)] == [
        [(3, 2)],
        [(4, 2)],
        [(4, 2), (5, 6)],
        [(4, 2), (8, 6)],
        [(4, 2), (8, 6), (20, 12)],
    ]
    again = TrainConfig(**values | {"past_batches": [[4, 2], [6, 6]], "batch_schedule": [[5, 3], [9, 5]]})
    assert again.batches_until(7) == [(4, 2), (6, 6), (7, 5)]
    assert again.batches_until(5) == [(4, 2), (5, 6)]  # a newer checkpoint is damaged
