"""How many windows each step of a run consumes, and at which positions. Imports no torch."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

BatchSizeStage = tuple[int, int]  # the last step of a stage, counted from 1, and the windows of each of its steps


class BatchSizeSchedule:
    """The global batch of every step: smaller ones at first, where the noise of a gradient matters less.

    What a batch averages out grows in importance as the loss falls (McCandlish et al. 2018, An Empirical Model of
    Large-Batch Training, section 2.2; Smith et al. 2018, Don't Decay the Learning Rate, Increase the Batch Size). Step
    s, counted from 0, consumes positions [first(s), first(s + 1)): like the order, a pure function of the step.

    Args:
        batch: Windows of a step after the last of the earlier stages; from the beginning where there are none.
        earlier: The stages before, in their order.
    """

    def __init__(self, batch: int, earlier: Sequence[BatchSizeStage] = ()) -> None:
        self.sizes = [*(size for _, size in earlier), batch]
        self._begins = [0, *(end for end, _ in earlier)]  # steps before each stage
        lengths = [end - begin for begin, (end, _) in zip(self._begins, earlier, strict=False)]
        self._firsts = [0, *accumulate(length * size for length, (_, size) in zip(lengths, earlier, strict=True))]

    def batch(self, step: int) -> int:
        """Windows of step ``step``, counted from 0."""
        return self.sizes[bisect_right(self._begins, step) - 1]

    def first(self, step: int) -> int:
        """Position of the first window of step ``step``, counted from 0: how many all steps before it consume."""
        stage = bisect_right(self._begins, step) - 1
        return self._firsts[stage] + (step - self._begins[stage]) * self.sizes[stage]

    def steps(self, windows: int) -> int:
        """Fewest steps that consume so many windows, at least one."""
        stage = bisect_left(self._firsts, windows) - 1
        return self._begins[stage] - (self._firsts[stage] - windows) // self.sizes[stage]
