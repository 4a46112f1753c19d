"""Detects runs that have lost what they had learned although their loss is finite. Imports no torch."""

import math

from gptlab.tracking.run_store.runs import Run

LOST_SHARE = 0.5  # of the decrease of the loss
LOST_NATS = 0.5  # several times the spread of the losses of single batches


def describe_blow_up(run: Run) -> str | None:
    """Returns in a sentence that a run has blown up; None if it has not, or if that is not known.

    A run has blown up if, at its end, it has lost at least half of what it had learned, and at least 0.5 nats per
    token: both its last val/loss and its last train/loss are above b + max((i - b) / 2, 0.5), where i is the train/loss
    of the first step, that is the loss before training, and b is its lowest val/loss, or i if that is lower. An
    overfitted run has a low train/loss, so it has not blown up.

    Args:
        run: Run that has ended.
    """
    (steps, train), (_, val) = run.series("train/loss"), run.series("val/loss")
    if not train or not val or steps[0] != 1 or not all(map(math.isfinite, (train[0], train[-1], val[-1]))):
        return None
    lowest = min(filter(math.isfinite, val))
    base = min(train[0], lowest)
    limit = base + max(LOST_SHARE * (train[0] - base), LOST_NATS)
    if min(val[-1], train[-1]) <= limit:
        return None
    return (
        f"The loss blew up: the last val/loss is {val[-1]:.4f}, the lowest one {lowest:.4f}, and the train/loss of the "
        f"first step {train[0]:.4f}."
    )
