"""Ranks the points of a sweep and compares the best one. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from gptlab.sweeps.analysis.phrases import BASELINE, Metric
from gptlab.sweeps.analysis.points import Point
from gptlab.sweeps.analysis.significance import Claim, adjusted_means, compare_all, find_step
from gptlab.tracking.run_store.sweeps import format_overrides

NEXT_BEST = "\0"  # key of the comparison of the best two points; the other keys are names of points


class Ranking(NamedTuple):
    """Points of a sweep in order, and their comparisons.

    Attributes:
        ranked: Points with a value, best first, by means that are adjusted for missing seeds.
        left_out: Points with a value that are not ranked, because too many of their trials failed or were pruned.
        claims: Comparisons of the points with the baseline by name, and of the best two as ``NEXT_BEST``.
        baseline: The baseline, or None if it is not a point or has no value.
        of_best: Comparisons of the first point with the baseline and the second best, by a description of the other.
        better: The one of them that is better than the first point on the seeds that both have, or None. If there is
            one, no point is the best.
    """

    ranked: list[Point]
    left_out: list[Point]
    claims: dict[str, Claim]
    baseline: Point | None
    of_best: dict[str, Claim]
    better: str | None


def rank(points: Sequence[Point], baseline: Point | None, metric: Metric) -> Ranking:
    """Ranks the points that have a value, and compares them with the baseline and the best two with each other.

    Args:
        points: Points of the sweep.
        baseline: One of them, or None.
        metric: Metric that is compared.
    """
    valued = [point for point in points if point.values]
    means = dict(zip(map(id, valued), adjusted_means([point.values for point in valued]), strict=True))
    in_order = sorted(valued, key=lambda point: means[id(point)], reverse=metric.is_maximized)
    ranked, left_out = ([p for p in in_order if p.is_biased == is_biased] for is_biased in (False, True))
    baseline = baseline if baseline is not None and baseline.values else None
    pairs = {}
    if baseline is not None:
        pairs = {format_overrides(p.settings): (p.values, baseline.values) for p in in_order if p is not baseline}
    if len(ranked) > 1 and not any(point is baseline for point in ranked[:2]):
        pairs[NEXT_BEST] = (ranked[0].values, ranked[1].values)
    step = find_step(chain.from_iterable(point.values.values() for point in valued))
    claims = compare_all(pairs, step)
    of_best = dict(_compare_best(ranked, baseline, claims, metric))
    better = [name for name, claim in of_best.items() if is_inferior(claim, metric)]
    if ranked and ranked[0] is baseline:
        names = {format_overrides(point.settings) for point in ranked[1:]}
        better += [n for n in names if claims[n].is_significant and not is_inferior(claims[n], metric)]
    return Ranking(ranked, left_out, claims, baseline, of_best, next(iter(better), None))


def is_inferior(claim: Claim, metric: Metric) -> bool:
    """Whether the mean difference, significant or not, is in favor of the other point."""
    difference = claim.comparison.difference
    return difference < 0 if metric.is_maximized else difference > 0


def _compare_best(
    ranked: Sequence[Point], baseline: Point | None, claims: Mapping[str, Claim], metric: Metric
) -> Iterator[tuple[str, Claim]]:
    """Yields the comparisons of the first point, without one in favor of a baseline that lost its worst trials."""
    if ranked and baseline is not None and ranked[0] is not baseline:
        claim = claims[format_overrides(ranked[0].settings)]
        if not (baseline.is_biased and is_inferior(claim, metric)):
            yield f"the {BASELINE} ({format_overrides(baseline.settings)})", claim
    if len(ranked) > 1 and ranked[1] is not baseline:
        name = format_overrides(ranked[1].settings)
        yield f"the second best ({name})", claims[name].reversed() if ranked[0] is baseline else claims[NEXT_BEST]
