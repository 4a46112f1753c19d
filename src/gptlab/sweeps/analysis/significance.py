"""Significance of a difference between runs, paired by seed if possible. Imports no torch.

Values are such that lower is better. A replicate is what tells the runs of a point apart: their seed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

ALPHA = 0.05  # how often a difference may be told that is none (Fisher 1925, section 12)

Replicate = tuple[str, ...]
Values = Mapping[Replicate, float]


class Estimate(NamedTuple):
    """Mean and its uncertainty.

    Attributes:
        n: Number of values.
        mean: Theirs.
        se: Standard error of the mean; None of a single value.
    """

    n: int
    mean: float
    se: float | None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the values; None of a single one."""
        return None if self.se is None else self.se * math.sqrt(self.n)


class Comparison(NamedTuple):
    """Comparison of the runs of two points.

    Attributes:
        method: "paired" by replicate, or "welch" where there are not two replicates that both have.
        n: Runs of the point that are compared; pairs, where they are paired.
        others: Runs that they are compared with.
        difference: Mean of the point less that of the other one: below 0 where the point is better.
        se: Standard error of the difference; None where a point has one run, and so are the following.
        p: How likely a difference of this size is, two-sided, where there is none.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end.
    """

    method: Literal["paired", "welch"]
    n: int
    others: int
    difference: float
    se: float | None
    p: float | None
    low: float | None
    high: float | None

    @property
    def seeds(self) -> str:
        """How many seeds it rests on."""
        if self.method == "paired":
            return f"{self.n} seeds"
        return (
            f"{self.n} seeds, not paired" if self.n == self.others else f"{self.n} and {self.others} seeds, not paired"
        )

    def reversed(self) -> "Comparison":
        """Returns the comparison seen from the other point."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return self._replace(n=self.others, others=self.n, difference=-self.difference, low=low, high=high)


class Claim(NamedTuple):
    """Comparison among several, with its corrected p value.

    Attributes:
        comparison: Taken alone.
        p: Of it, raised for all that were made; None where it says nothing.
    """

    comparison: Comparison
    p: float | None

    @property
    def is_shown(self) -> bool:
        """Whether the difference is more than noise."""
        return self.p is not None and self.p < ALPHA

    def reversed(self) -> "Claim":
        """Returns the comparison seen from the other point."""
        return Claim(self.comparison.reversed(), self.p)


def estimate(values: Sequence[float]) -> Estimate:
    """Estimates a mean from at least one value."""
    n = len(values)
    return Estimate(n, float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None)


def compare(values: Values, others: Values) -> Comparison:
    """Compares the runs of a point with those of another one.

    Two replicates that both have are enough for the t test of the differences (Student 1908); it takes out what a seed
    does to both. Otherwise it is Welch's test (Welch 1947), which supposes no equal variances.

    Args:
        values: Of the point, by replicate; at least one.
        others: Of the other one, likewise.
    """
    common = [replicate for replicate in values if replicate in others]
    if len(common) > 1:
        of = estimate([values[replicate] - others[replicate] for replicate in common])
        return _t_test("paired", of.n, of.n, of.mean, of.se or 0.0, of.n - 1)
    mine, theirs = estimate(list(values.values())), estimate(list(others.values()))
    if mine.se is None or theirs.se is None:
        difference = values[common[0]] - others[common[0]] if common else mine.mean - theirs.mean
        return Comparison("paired" if common else "welch", mine.n, theirs.n, difference, None, None, None, None)
    of_mean = (mine.se**2, theirs.se**2)  # variances
    weights = sum(variance**2 / (n - 1) for variance, n in zip(of_mean, (mine.n, theirs.n), strict=True))
    freedom = sum(of_mean) ** 2 / weights if weights else mine.n + theirs.n - 2
    return _t_test("welch", mine.n, theirs.n, mine.mean - theirs.mean, math.sqrt(sum(of_mean)), freedom)


def compare_all(pairs: Mapping[str, tuple[Values, Values]]) -> dict[str, Claim]:
    """Makes several comparisons, corrected so that together they err as rarely as one; by the names of the pairs."""
    comparisons = {name: compare(*pair) for name, pair in pairs.items()}
    p_values = {name: comparison.p for name, comparison in comparisons.items() if comparison.p is not None}
    raised = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return {name: Claim(comparison, raised.get(name)) for name, comparison in comparisons.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Raise the p values of several comparisons so that all of them together err as rarely as one (Holm 1979).

    Below ``ALPHA`` are then those that Holm's procedure rejects, and in all but ``ALPHA`` of tables rightly.
    """
    raised, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        raised[index] = highest
    return raised


def _t_test(
    method: Literal["paired", "welch"], n: int, others: int, difference: float, se: float, freedom: float
) -> Comparison:
    """Tests a difference by Student's distribution; without noise, every difference but 0 is significant."""
    if se == 0:
        return Comparison(method, n, others, difference, se, float(difference == 0), difference, difference)
    p = 2 * float(special.stdtr(freedom, -abs(difference) / se))
    reach = se * float(special.stdtrit(freedom, 1 - ALPHA / 2))
    return Comparison(method, n, others, difference, se, p, difference - reach, difference + reach)
