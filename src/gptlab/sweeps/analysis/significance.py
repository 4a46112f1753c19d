"""Significance tests of differences between points, paired by seed if possible. Imports no torch.

A replicate identifies a run of a point: its seed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

ALPHA = 0.05  # significance level (Fisher 1925, section 12)
POWER = 0.8  # probability that a difference of the measured size is found to be significant (Cohen 1988, section 2.4)
MAX_SEEDS = 100  # largest number of seeds that is recommended
STEP_TOLERANCE = 1e-6  # of the median value; below the resolution of losses in float32 times some operations

Replicate = tuple[str, ...]
Values = Mapping[Replicate, float]


class Estimate(NamedTuple):
    """Mean with its uncertainty.

    Attributes:
        n: Number of values.
        mean: Mean of the values.
        se: Standard error of the mean, or None for a single value.
    """

    n: int
    mean: float
    se: float | None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the values, or None for a single value."""
        return None if self.se is None else self.se * math.sqrt(self.n)


class Comparison(NamedTuple):
    """Comparison of the runs of two points.

    Attributes:
        method: "paired" (t-test paired by replicate), or "welch" (Welch's t-test) if fewer than two replicates match.
        n: Number of runs of the point; number of pairs, if paired.
        others: Number of runs of the other point; number of pairs, if paired.
        difference: Mean of the point minus mean of the other point; negative if the point is better.
        se: Standard error of the difference. ``se``, ``p``, ``low`` and ``high`` are None if a point has a single run.
        p: Two-sided p-value, not corrected for multiple comparisons.
        low: Lower end of the 95% confidence interval of the difference.
        high: Upper end of that interval.
        is_partial: Whether runs of either point were left out because the other point has no run with their seed.
    """

    method: Literal["paired", "welch"]
    n: int
    others: int
    difference: float
    se: float | None
    p: float | None
    low: float | None
    high: float | None
    is_partial: bool = False

    @property
    def seeds(self) -> str:
        """Number of seeds, as text: "5 seeds", "4 common seeds", "5 and 3 seeds, unpaired"."""
        if self.method == "paired":
            return f"{self.n} common seeds" if self.is_partial else f"{self.n} seeds"
        return f"{self.n} seeds, unpaired" if self.n == self.others else f"{self.n} and {self.others} seeds, unpaired"

    def reversed(self) -> "Comparison":
        """Returns the comparison seen from the other point."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return self._replace(n=self.others, others=self.n, difference=-self.difference, low=low, high=high)


class Claim(NamedTuple):
    """Comparison with a p-value that is corrected for multiple comparisons.

    Attributes:
        comparison: The comparison, not corrected.
        p: Corrected p-value, or None if the comparison has no p-value.
    """

    comparison: Comparison
    p: float | None

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p-value is below ``ALPHA``."""
        return self.p is not None and self.p < ALPHA

    def seeds_needed(self) -> int | None:
        """Returns the number of seeds per point with which a difference of the measured size would be significant.

        With this many seeds, the t-test finds a true difference of this size with probability ``POWER``. The level of
        the test is corrected as the p-value is. None: more than ``MAX_SEEDS``, or the difference has no standard error.
        """
        method, n, others, difference, se, p, *_ = self.comparison
        if not se or not p or not self.p:
            return None
        per_seed = se * math.sqrt(2 / (1 / n + 1 / others))  # standard error of the difference with one seed per point
        level = ALPHA * p / self.p
        for seeds in range(2, MAX_SEEDS + 1):
            freedom = (seeds - 1) * (1 if method == "paired" else 2)
            needed = special.stdtrit(freedom, 1 - level / 2) + special.stdtrit(freedom, POWER)
            if abs(difference) / per_seed * math.sqrt(seeds) >= needed:
                return seeds
        return None

    def reversed(self) -> "Claim":
        """Returns the comparison seen from the other point."""
        return Claim(self.comparison.reversed(), self.p)


def estimate(values: Sequence[float]) -> Estimate:
    """Estimates a mean from at least one value."""
    n = len(values)
    return Estimate(n, float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None)


def compare(values: Values, others: Values, step: float = 0.0) -> Comparison:
    """Compares the runs of a point with the runs of another point.

    With at least two common replicates, uses the paired t-test (Student 1908), which removes the effect of a seed that
    both points share. Otherwise uses Welch's t-test (Welch 1947), which does not assume equal variances.

    Args:
        values: Values of the point by replicate, at least one.
        others: Values of the other point by replicate, at least one.
        step: Resolution of the metric. The variance of rounding errors, step^2 / 12 for a value, is added to the
            variance of the values, which is underestimated if values are equal by rounding.
    """
    rounding = step**2 / 12
    common = [replicate for replicate in values if replicate in others]
    if len(common) > 1:
        n, mean, se = estimate([values[replicate] - others[replicate] for replicate in common])
        is_partial = len(values.keys() | others.keys()) > n
        return _t_test("paired", n, n, mean, math.hypot(se or 0, math.sqrt(2 * rounding / n)), n - 1, is_partial)
    mine, theirs = estimate(list(values.values())), estimate(list(others.values()))
    if mine.se is None or theirs.se is None:
        difference = values[common[0]] - others[common[0]] if common else mine.mean - theirs.mean
        return Comparison("paired" if common else "welch", mine.n, theirs.n, difference, None, None, None, None)
    variances = [rounding / found.n + (found.se or 0) ** 2 for found in (mine, theirs)]  # of the means
    weights = sum(variance**2 / (n - 1) for variance, n in zip(variances, (mine.n, theirs.n), strict=True))
    freedom = sum(variances) ** 2 / weights if weights else mine.n + theirs.n - 2
    return _t_test("welch", mine.n, theirs.n, mine.mean - theirs.mean, math.sqrt(sum(variances)), freedom)


def compare_all(pairs: Mapping[str, tuple[Values, Values]], step: float = 0.0) -> dict[str, Claim]:
    """Compares several pairs of points, with p-values corrected by ``holm``; returns the claims by name."""
    comparisons = {name: compare(*pair, step) for name, pair in pairs.items()}
    p_values = {name: comparison.p for name, comparison in comparisons.items() if comparison.p is not None}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return {name: Claim(comparison, corrected.get(name)) for name, comparison in comparisons.items()}


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for multiple comparisons by the Holm-Bonferroni method (Holm 1979).

    The probability that any of the corrected p-values is below ``ALPHA`` by chance is at most ``ALPHA``.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def find_step(values: Iterable[float]) -> float:
    """Returns the resolution of a metric: the largest step of which all differences of its values are multiples.

    An accuracy over 100 examples has the step 0.01. Values without a common step, such as losses, result in a number
    near ``STEP_TOLERANCE`` times their median; equal values result in 0.
    """
    levels = np.unique([*values])
    tolerance = STEP_TOLERANCE * float(np.median(np.abs(levels))) if levels.size else 0.0
    step = 0.0
    for gap in np.diff(levels):
        following = float(gap)
        while following > tolerance:  # Euclid's algorithm
            step, following = following, step % following
            if step - following < tolerance:  # the remainder of a multiple may be slightly less than the step
                following = 0.0
    return step


def adjusted_means(points: Sequence[Values]) -> tuple[list[float], bool]:
    """Returns the mean of each point, adjusted for the seeds that it lacks, and whether the means can be compared.

    The values are fitted by the sum of an effect of the point and an effect of the seed (the additive two-way model,
    Yates 1934, by least squares). The adjusted mean of a point is its effect plus the mean effect of all seeds. It is
    the plain mean if all points have the same seeds. The model is not determined if two groups of points have no seed
    in common. Then the plain means are returned, which differ by the effects of the seeds.
    """
    plain = [float(np.mean([*values.values()])) for values in points]
    seeds = {seed: number for number, seed in enumerate(dict.fromkeys(seed for values in points for seed in values))}
    if all(len(values) == len(seeds) for values in points):
        return plain, True
    rows = [(number, seeds[seed], value) for number, values in enumerate(points) for seed, value in values.items()]
    design = np.zeros((len(rows), len(points) + len(seeds)))
    for row, (point, seed, _) in enumerate(rows):
        design[row, point] = design[row, len(points) + seed] = 1
    effects, _, rank, _ = np.linalg.lstsq(design, np.array([value for *_, value in rows]), rcond=None)
    if rank < len(points) + len(seeds) - 1:
        return plain, False
    return [float(effect) for effect in effects[: len(points)] + np.mean(effects[len(points) :])], True


def _t_test(
    method: Literal["paired", "welch"],
    n: int,
    others: int,
    difference: float,
    se: float,
    freedom: float,
    is_partial: bool = False,
) -> Comparison:
    """Tests a difference with a t-test; if its standard error is 0, any difference other than 0 is significant."""
    if se == 0:
        p = float(difference == 0)
        return Comparison(method, n, others, difference, se, p, difference, difference, is_partial)
    p = 2 * float(special.stdtr(freedom, -abs(difference) / se))
    half_width = se * float(special.stdtrit(freedom, 1 - ALPHA / 2))
    low, high = difference - half_width, difference + half_width
    return Comparison(method, n, others, difference, se, p, low, high, is_partial)
