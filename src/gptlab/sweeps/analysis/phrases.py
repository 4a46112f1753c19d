"""Text of the results of a sweep: values with uncertainty, comparisons, the one-line answer. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gptlab.sweeps.analysis.significance import MAX_SEEDS, Claim, Estimate

BASELINE = "baseline"
NOT_SIGNIFICANT = "not significant"
NOT_COMPARABLE = "not comparable"
ONE_SEED = "one seed, significance unknown"
UNITS = {"train/loss": "nats", "val/loss": "nats", "val/bits_per_byte": "bits per byte"}
DIGITS = 4  # decimal places of a value without a standard error
MAX_DIGITS = 6
SHOWN = 3  # names of points in one sentence


class Metric(NamedTuple):
    """Metric that a sweep compares.

    Attributes:
        name: Column of metrics.csv.
        is_maximized: Whether higher values are better.
    """

    name: str
    is_maximized: bool

    @property
    def unit(self) -> str:
        """Unit of its values; "" if it is unknown or they have none."""
        return UNITS.get(self.name, "")


class BestResult(NamedTuple):
    """Contents of the one-line answer.

    Attributes:
        name: Name of the best point.
        estimate: Estimate of its value.
        lost: Its failed and pruned trials, as text, or "".
        comparisons: Comparisons of the best point with others, by what they are: "the baseline (optimizer.lr=1e-3)".
        is_baseline: Whether the best point is the baseline.
        is_only: Whether no other point has a value.
        left_out: Points that are not ranked, with the reason: "optimizer.lr=4e-3 (2 of 5 trials failed)".
    """

    name: str
    estimate: Estimate
    lost: str
    comparisons: Mapping[str, Claim]
    is_baseline: bool
    is_only: bool
    left_out: Sequence[str]


def plus_minus(value: float, se: float | None) -> str:
    """Formats a value and its standard error, to two significant digits of the error: "1.643 ± 0.012"."""
    if se is None:
        return f"{value:.{DIGITS}f}"
    digits = DIGITS if se == 0 else min(max(1 - math.floor(math.log10(se)), 0), MAX_DIGITS)
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def quantity(value: float, se: float | None, metric: Metric) -> str:
    """Formats a value of a metric with its standard error and unit."""
    return f"{plus_minus(value, se)} {metric.unit}".rstrip()


def verdict(claim: Claim, metric: Metric, lost: str = "") -> str:
    """Formats a comparison with the baseline: "better by 0.012 ± 0.003 nats (5 seeds)".

    Args:
        claim: The comparison.
        metric: Metric that is compared.
        lost: Failed and pruned trials of the better of the two points, if they are too many to name it better.
    """
    if claim.p is None:
        return ONE_SEED
    if not claim.is_significant:
        return f"{NOT_SIGNIFICANT} (p = {claim.p:.2g})"
    if lost:
        return f"{NOT_COMPARABLE}: {lost}"
    return f"{_word(claim, metric)} by {_amount(claim, metric)} ({claim.comparison.seeds})"


def best_line(best: BestResult, metric: Metric, *, is_over: bool) -> str:
    """Returns the one-line answer of a sweep with several points."""
    role = f", the {BASELINE}" if best.is_baseline else ""
    lost = f" ({best.lost})" if best.lost else ""
    parts = [f"best{'' if is_over else ' so far'}: {best.name}{role}, {quantity(*best.estimate[1:], metric)}{lost}"]
    parts += [_compared_with(claim, metric, other) for other, claim in best.comparisons.items()]
    if best.is_only:
        parts.append("no other point has a value")
    if best.left_out:
        parts.append(f"not ranked: {join_some(best.left_out)}")
    return "; ".join(dict.fromkeys(parts))


def join_some(names: Sequence[str]) -> str:
    """Joins the first three names: "a, b, c and 2 more"."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def spread_line(estimate: Estimate, metric: Metric) -> str:
    """Returns the one-line answer of a sweep with one point: its mean and the standard deviation over seeds."""
    if estimate.deviation is None:
        return f"{quantity(*estimate[1:], metric)}; {ONE_SEED}"
    deviation = f"{estimate.deviation:.2g} {metric.unit}".rstrip()
    return f"{quantity(*estimate[1:], metric)} over {estimate.n} seeds, standard deviation {deviation}"


def format_counts(counts: dict[str, int]) -> str:
    """Formats counts that are not zero: "2 failed, 1 pruned"."""
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def _word(claim: Claim, metric: Metric) -> str:
    return "better" if (claim.comparison.difference > 0) == metric.is_maximized else "worse"


def _amount(claim: Claim, metric: Metric) -> str:
    return quantity(abs(claim.comparison.difference), claim.comparison.se, metric)


def _more_seeds(claim: Claim) -> str:
    """Formats the p-value of a difference that is not significant, and the seeds that one of its size needs."""
    p = f"p = {claim.p:.2g}"
    if claim.comparison.difference == 0:
        return p
    needed = claim.seeds_needed()
    seeds = f"more than {MAX_SEEDS}" if needed is None else f"about {needed}"
    return f"{p}; more seeds are needed, {seeds} for a difference of this size"


def _compared_with(claim: Claim, metric: Metric, other: str) -> str:
    """Formats the comparison of the best point with another point."""
    if claim.p is None:
        return f"{ONE_SEED}: more seeds are needed"
    if not claim.is_significant:
        return f"no significant difference from {other}: {_more_seeds(claim)}"
    seeds = f" ({claim.comparison.seeds})" if claim.comparison.is_partial else ""
    return f"{_word(claim, metric)} than {other} by {_amount(claim, metric)}{seeds}"
