"""Ranks the points of a sweep and compares the best one. Imports no torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import NamedTuple

from gptlab.sweeps.analysis.phrases import BASELINE, Metric
from gptlab.sweeps.analysis.points import Point
from gptlab.sweeps.analysis.significance import Claim, adjusted_means, compare_all, find_step

NEXT_BEST = "\0"  # key of the comparison of the best two points; the other keys are names of points


class Ranking(NamedTuple):
    """Points of a sweep in order, and their comparisons.

    Attributes:
        ranked: Points with a value, best first, by means that are adjusted for missing seeds.
        left_out: Points with a value that are not ranked, because too many of their trials failed or were pruned.
        claims: Comparisons of the points with the baseline by name, and of the best two as ``NEXT_BEST``.
        baseline: The baseline, or None if it is not a point or has no value.
        of_best: Comparisons of the first point with the baseline and the second best, by a description of the other.
        no_best: Why the first point is not the best one; None if it is.
        is_adjusted: Whether the order is not that of the plain means, because some points lack seeds.
    """

    ranked: list[Point]
    left_out: list[Point]
    claims: dict[str, Claim]
    baseline: Point | None
    of_best: dict[str, Claim]
    no_best: str | None
    is_adjusted: bool


def rank(points: Sequence[Point], baseline: Point | None, metric: Metric) -> Ranking:
    """Ranks the points that have a value, and compares them with the baseline and the best two with each other.

    Args:
        points: Points of the sweep.
        baseline: One of them, or None.
        metric: Metric that is compared.
    """
    valued = [point for point in points if point.values]
    can_win = [point for point in valued if not point.is_biased]
    means, is_determined = adjusted_means([point.values for point in can_win])
    order = sorted(range(len(can_win)), key=means.__getitem__, reverse=metric.is_maximized)
    ranked, best_means = [can_win[i] for i in order], [means[i] for i in order[:2]]
    left_out = sorted(
        (point for point in valued if point.is_biased),
        key=lambda point: fmean(point.values.values()),
        reverse=metric.is_maximized,
    )
    baseline = baseline if baseline is not None and baseline.values else None
    pairs = {}
    if baseline is not None:
        pairs = {p.name: (p.values, baseline.values) for p in (*ranked, *left_out) if p is not baseline}
    if len(ranked) > 1 and not any(point is baseline for point in ranked[:2]):
        pairs[NEXT_BEST] = (ranked[0].values, ranked[1].values)
    claims = compare_all(pairs, find_step(chain.from_iterable(point.values.values() for point in valued)))
    of_best = dict(_compare_best(ranked, baseline, claims, metric))
    no_best = None
    if not is_determined:
        no_best = "the points have too few seeds in common"
    elif len(ranked) > 1 and math.isclose(*best_means, rel_tol=1e-12):
        no_best = f"{ranked[0].name} and {ranked[1].name} have the same mean"
    else:
        better = [name for name, claim in of_best.items() if is_inferior(claim, metric)]
        if ranked and ranked[0] is baseline:
            names = [point.name for point in ranked[1:]]
            better += [n for n in names if claims[n].is_significant and not is_inferior(claims[n], metric)]
        if better:
            no_best = f"{ranked[0].name} has the best mean, but {better[0]} is better on the seeds that both have"
    is_adjusted = is_determined and len({frozenset(point.values) for point in ranked}) > 1
    return Ranking(ranked, left_out, claims, baseline, of_best, no_best, is_adjusted)


def is_inferior(claim: Claim, metric: Metric) -> bool:
    """Whether the mean difference, significant or not, is in favor of the other point."""
    difference = claim.comparison.difference
    return difference < 0 if metric.is_maximized else difference > 0


def _compare_best(
    ranked: Sequence[Point], baseline: Point | None, claims: Mapping[str, Claim], metric: Metric
) -> Iterator[tuple[str, Claim]]:
    """Yields the comparisons of the first point, without one in favor of a baseline that lost its worst trials."""
    if ranked and baseline is not None and ranked[0] is not baseline:
        claim = claims[ranked[0].name]
        if not (baseline.is_biased and is_inferior(claim, metric)):
            yield f"the {BASELINE} ({baseline.name})", claim
    if len(ranked) > 1 and ranked[1] is not baseline:
        name = ranked[1].name
        yield f"the second best ({name})", claims[name].reversed() if ranked[0] is baseline else claims[NEXT_BEST]
