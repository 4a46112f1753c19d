"""Runs whose finite loss blew up, by the numbers of metrics.csv."""

import math

import pytest

from gptlab.tracking.run_store.blow_up import describe_blow_up
from gptlab.tracking.run_store.runs import Run
from run_directories import write_metrics


@pytest.mark.parametrize(
    ("train", "val", "is_blown_up"),
    [
        ((5.55, 90.0, 390.0), (83.0, 388.0), True),  # from the start: the best evaluation is worse than none
        ((5.55, 80.0), (83.0,), True),
        ((10.9, 3.6, 7.5), (3.5, 7.5), True),  # the model predicts token frequencies only: 7.5 > (10.9 + 3.5) / 2
        ((10.9, 3.6, 7.0), (3.5, 7.0), False),  # recovers
        ((10.9, 3.6, 7.5), (3.5, 3.6), False),  # one bad batch
        ((4.2, 1.2, 0.3), (1.5, 3.5), False),  # overfitted
        ((3.4, 1.0), (3.3, 3.9), False),  # overfitted when fine-tuned
        ((3.4, 9.0), (3.3, 9.1), True),
        ((5.55, 5.57), (5.58,), False),  # has not learned anything
        ((5.55, 1.9, 1.8), (2.0, 1.9), False),
        ((5.55, 1.9, math.nan), (2.0, math.nan), False),  # diverged
        ((5.55, 2.0), (), False),
        ((), (), False),
    ],
)
def test_a_run_has_blown_up_if_it_lost_half_of_what_it_had_learned(tmp_path, train, val, is_blown_up):
    rows = [{"step": 1 + 10 * i, "train/loss": loss} for i, loss in enumerate(train)]
    rows += [{"step": 10 * (i + 1), "val/loss": loss} for i, loss in enumerate(val)]
    write_metrics(tmp_path, sorted(rows, key=lambda row: row["step"]))
    message = describe_blow_up(Run(tmp_path))
    assert (message is not None) == is_blown_up
    if message is not None:
        assert f"{val[-1]:.4f}" in message


def test_without_the_first_step_the_loss_before_training_is_not_known(tmp_path):
    write_metrics(tmp_path, [{"step": 10, "train/loss": 90.0}, {"step": 10, "val/loss": 90.0}])
    assert describe_blow_up(Run(tmp_path)) is None
