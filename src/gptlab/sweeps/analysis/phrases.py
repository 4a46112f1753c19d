"""Comparisons in words. Imports no torch."""

import math
from typing import NamedTuple

from gptlab.sweeps.analysis.significance import Claim, Estimate

BASELINE = "baseline"
NO_DIFFERENCE = "no difference shown"
ONE_SEED = "one seed: no statement about noise"
UNITS = {"train/loss": "nats", "val/loss": "nats", "val/bits_per_byte": "bits per byte"}
DIGITS = 4  # after the point, where no standard error says how many there should be
MAX_DIGITS = 6


class BestResult(NamedTuple):
    """Contents of the one-line answer.

    Attributes:
        name: Of the best point.
        estimate: Of its value.
        baseline: Name of the point that others are compared with; None where that has no value.
        to_baseline: The best beside the baseline; None where it is the baseline.
        following: Name of the next best point; None where there is none.
        to_following: The best beside that one.
    """

    name: str
    estimate: Estimate
    baseline: str | None
    to_baseline: Claim | None
    following: str | None
    to_following: Claim | None


def plus_minus(value: float, se: float | None) -> str:
    """Formats a value with its standard error, which has two significant digits."""
    if se is None:
        return f"{value:.{DIGITS}f}"
    digits = DIGITS if se == 0 else min(max(1 - math.floor(math.log10(se)), 0), MAX_DIGITS)
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def quantity(value: float, se: float | None, metric: str) -> str:
    """Formats a value of a metric, with its unit."""
    return f"{plus_minus(value, se)} {UNITS.get(metric, '')}".rstrip()


def verdict(claim: Claim, metric: str) -> str:
    """Formats a comparison with the baseline: "better by 0.012 ± 0.003 nats at 5 seeds"."""
    if claim.p is None:
        return ONE_SEED
    if not claim.is_shown:
        return NO_DIFFERENCE
    return f"{_word(claim)} by {_amount(claim, metric)} at {claim.comparison.seeds}"


def best_line(best: BestResult, metric: str, *, is_over: bool) -> str:
    """Returns the one-line answer of a sweep of several points."""
    role = f", the {BASELINE}" if best.name == best.baseline else ""
    told = [f"best{'' if is_over else ' so far'}: {best.name}{role}, {quantity(*best.estimate[1:], metric)}"]
    if best.to_baseline is not None:
        told.append(_beside(best.to_baseline, metric, f"the {BASELINE} ({best.baseline})"))
    if best.to_following is not None and best.following != best.baseline:
        told.append(_beside(best.to_following, metric, f"the next ({best.following})"))
    if best.following is None:
        told.append("no other point has a value")
    return "; ".join(dict.fromkeys(told))


def spread_line(estimate: Estimate, metric: str) -> str:
    """Returns the one-line answer of a sweep of one point: the spread of its seeds."""
    if estimate.deviation is None:
        return f"{quantity(*estimate[1:], metric)}; {ONE_SEED}"
    apart = f"{estimate.deviation:.2g} {UNITS.get(metric, '')}".rstrip()
    return f"{quantity(*estimate[1:], metric)} over {estimate.n} seeds, whose standard deviation is {apart}"


def format_counts(counts: dict[str, int]) -> str:
    """Formats counts that are not zero: "2 failed, 1 pruned"."""
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def _word(claim: Claim) -> str:
    return "better" if claim.comparison.difference < 0 else "worse"


def _amount(claim: Claim, metric: str) -> str:
    return quantity(abs(claim.comparison.difference), claim.comparison.se, metric)


def _beside(claim: Claim, metric: str, other: str) -> str:
    """Formats the comparison of the best point with another one."""
    if claim.p is None:
        return ONE_SEED
    if not claim.is_shown:
        return f"{NO_DIFFERENCE} between it and {other}"
    return f"{_word(claim)} than {other} by {_amount(claim, metric)}"
