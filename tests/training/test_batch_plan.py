import pytest

from gptlab.errors import UserError
from gptlab.training.batch_plan import BatchPlan, plan_batch


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
