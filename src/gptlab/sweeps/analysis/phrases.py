"""Text of the results of a sweep: values with uncertainty, comparisons, the one-line answer. Imports no torch."""

import math
from typing import NamedTuple

from gptlab.sweeps.analysis.significance import MAX_SEEDS, Claim, Estimate

BASELINE = "baseline"
NOT_SIGNIFICANT = "not significant"
ONE_SEED = "one seed, significance unknown"
UNITS = {"train/loss": "nats", "val/loss": "nats", "val/bits_per_byte": "bits per byte"}
DIGITS = 4  # decimal places of a value without a standard error
MAX_DIGITS = 6


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
        baseline: Name of the baseline, or None if the baseline has no value.
        to_baseline: Comparison of the best point with the baseline, or None if the best point is the baseline.
        following: Name of the second best point, or None if no other point has a value.
        to_following: Comparison of the best point with the second best.
    """

    name: str
    estimate: Estimate
    baseline: str | None
    to_baseline: Claim | None
    following: str | None
    to_following: Claim | None


def plus_minus(value: float, se: float | None) -> str:
    """Formats a value and its standard error, to two significant digits of the error: "1.643 ± 0.012"."""
    if se is None:
        return f"{value:.{DIGITS}f}"
    digits = DIGITS if se == 0 else min(max(1 - math.floor(math.log10(se)), 0), MAX_DIGITS)
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def quantity(value: float, se: float | None, metric: Metric) -> str:
    """Formats a value of a metric with its standard error and unit."""
    return f"{plus_minus(value, se)} {metric.unit}".rstrip()


def verdict(claim: Claim, metric: Metric) -> str:
    """Formats a comparison with the baseline: "better by 0.012 ± 0.003 nats (5 seeds)"."""
    if claim.p is None:
        return ONE_SEED
    if not claim.is_significant:
        return f"{NOT_SIGNIFICANT} (p = {claim.p:.2g})"
    return f"{_word(claim, metric)} by {_amount(claim, metric)} ({claim.comparison.seeds})"


def best_line(best: BestResult, metric: Metric, *, is_over: bool) -> str:
    """Returns the one-line answer of a sweep with several points."""
    role = f", the {BASELINE}" if best.name == best.baseline else ""
    parts = [f"best{'' if is_over else ' so far'}: {best.name}{role}, {quantity(*best.estimate[1:], metric)}"]
    if best.to_baseline is not None:
        parts.append(_compared_with(best.to_baseline, metric, f"the {BASELINE} ({best.baseline})"))
    if best.to_following is not None and best.following != best.baseline:
        parts.append(_compared_with(best.to_following, metric, f"the second best ({best.following})"))
    if best.following is None:
        parts.append("no other point has a value")
    return "; ".join(dict.fromkeys(parts))


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
    return f"{_word(claim, metric)} than {other} by {_amount(claim, metric)}"
