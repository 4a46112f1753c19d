import pytest

from gptlab.errors import UserError
from gptlab.training.batch_plan import BatchPlan, plan_batch


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "plan"),
    [
        (480, 12, 8, BatchPlan(8, 12, 5)),
        (480, 12, 1, BatchPlan(1, 12, 40)),  # nanoGPT's 40 accumulations
        (12, None, 1, BatchPlan(1, 12, 1)),
        (12, None, 2, BatchPlan(2, 6, 1)),
    ],
)
def test_accumulation_follows_from_the_global_batch(global_batch, micro_batch, world, plan):
    assert plan_batch(global_batch, micro_batch, world) == plan


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "nearest"),
    [(10, 4, 1, "8 and 12"), (480, 12, 7, "420 and 504"), (2, None, 3, "3"), (13, None, 4, "12 and 16")],
)
def test_a_batch_that_is_not_divisible_is_refused_with_the_nearest_that_are(global_batch, micro_batch, world, nearest):
    with pytest.raises(UserError, match=rf"train.global_batch_size={global_batch} .* The nearest: {nearest}\."):
        plan_batch(global_batch, micro_batch, world)


def test_earlier_batches_have_the_same_accumulation():
    plan = plan_batch(24, 6, 2, [(10, 4), (20, 8)])
    assert plan == BatchPlan(2, 6, 2, ((10, 4), (20, 8)))
    assert [plan.stages.batch(step) for step in (0, 9, 10, 19, 20)] == [4, 4, 8, 8, 24]
    assert plan_batch(24, 6, 2).stages.sizes == [24]


def test_an_earlier_batch_that_is_not_divisible_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_schedule=10 is not divisible by 4 .* The nearest: 8 and 12\."):
        plan_batch(24, 6, 2, [(5, 8), (7, 10)])
