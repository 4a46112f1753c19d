"""Simulated sweeps with known true effects: how often their results are wrong.

``python tests/helpers/simulated_sweeps.py`` prints the tables in docs/answers.md.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from gptlab.sweeps.analysis.phrases import Metric
from gptlab.sweeps.analysis.points import Point, find_point, group_points
from gptlab.sweeps.analysis.ranking import NEXT_BEST, Ranking, rank
from gptlab.sweeps.analysis.significance import Claim
from gptlab.sweeps.analysis.table import answer_line, point_verdict

POINTS, SEEDS = (2, 5, 15), (2, 3, 5, 10)
METRIC = Metric("val/loss", is_maximized=False)
EFFECT = 2.0  # of the point that is truly best, in standard deviations of the noise
Rng = np.random.Generator
NOISE: dict[str, Callable[[Rng, int, int], np.ndarray]] = {  # (points, seeds), standard deviation 1
    "normal": lambda rng, points, seeds: rng.normal(size=(points, seeds)),
    "t with 3 degrees of freedom": lambda rng, points, seeds: rng.standard_t(3, (points, seeds)) / np.sqrt(3),
    "spikes": lambda rng, points, seeds: (
        (rng.normal(size=(points, seeds)) + 5 * (rng.random((points, seeds)) < 0.05)) / np.sqrt(1 + 25 * 0.0475)
    ),
    "seed effects": lambda rng, points, seeds: rng.normal(size=(points, seeds)) + 10 * rng.normal(size=seeds),
    "rounded to 1 sd": lambda rng, points, seeds: np.round(rng.normal(size=(points, seeds)) + rng.normal(size=seeds)),
}
FAILURES = ("none", "at random", "highest tenth", "worst seeds of a point")


class Rates(NamedTuple):
    """Shares of simulated sweeps.

    Attributes:
        alarms: Without an effect, a difference is called significant.
        wrong: With an effect of one point, another point, or one that is not better, is called significantly better.
        right: With an effect of one point, this point is named best.
        covered: Confidence intervals that contain the true difference.
        contradictions: One-line answers that contradict the table.
    """

    alarms: float
    wrong: float
    right: float
    covered: float
    contradictions: int


class Result(NamedTuple):
    """Result of one simulated sweep: its comparisons by the numbers of both points, verdicts and one-line answer."""

    ranking: Ranking
    claims: dict[tuple[int, int], Claim]
    verdicts: dict[int, str]
    line: str

    def claimed(self) -> Iterator[tuple[int, int]]:
        """Yields the better and the other point of each difference that the result calls significant."""
        for (first, second), claim in self.claims.items():
            is_next_best = first in self.verdicts and not self.verdicts[first].startswith(("better", "worse"))
            told = "than the second best" in self.line if is_next_best else True
            if claim.is_significant and told and "not comparable" not in self.verdicts[first]:
                yield (first, second) if claim.comparison.difference < 0 else (second, first)


def simulate(points: int, seeds: int, noise: str, failures: str, draws: int) -> Rates:
    """Analyzes ``draws`` sweeps without an effect, and as many in which one point is better by ``EFFECT``."""
    rng = np.random.default_rng([points, seeds, [*NOISE].index(noise), FAILURES.index(failures)])
    alarms = wrong = right = covered = intervals = contradictions = 0
    for draw in range(2 * draws):
        effects = np.zeros(points)
        if draw % 2:
            effects[rng.integers(points)] = -EFFECT
        values = NOISE[noise](rng, points, seeds) + effects[:, None]
        result = analyze(values, _failed(rng, values, failures))
        claimed = [*result.claimed()]
        contradictions += _is_contradictory(result)
        if draw % 2:
            wrong += any(effects[better] >= effects[other] for better, other in claimed)
            right += result.line.startswith(f"best: lr={np.argmin(effects)},")
        else:
            alarms += bool(claimed)
        for (first, second), claim in result.claims.items():
            if second == 0 and claim.comparison.low is not None and claim.comparison.high is not None:
                covered += claim.comparison.low <= effects[first] - effects[0] <= claim.comparison.high
                intervals += 1
    return Rates(alarms / draws, wrong / draws, right / draws, covered / max(intervals, 1), contradictions)


def analyze(values: np.ndarray, failed: np.ndarray) -> Result:
    """Analyzes a sweep whose first point is the baseline; both arrays have the shape (points, seeds)."""
    trials = [
        SimpleNamespace(  # a validated Trial takes as long as the analysis
            number=number,
            overrides={"lr": str(point), "seed": str(seed)},
            blew_up=False,
            state="failed" if failed[point, seed] else "done",
            value=None if failed[point, seed] else float(values[point, seed]),
        )
        for number, (point, seed) in enumerate(np.ndindex(*values.shape))
    ]
    points = group_points(trials)
    baseline = find_point(points, {"lr": "0"})
    ranking = rank(points, baseline, METRIC)
    verdicts = {
        _number(point): point_verdict(point, ranking, METRIC, is_baseline=point is baseline)
        for point in (*ranking.ranked, *ranking.left_out)
    }
    claims = {
        tuple(map(_number, ranking.ranked[:2])) if name == NEXT_BEST else (int(name.removeprefix("lr=")), 0): claim
        for name, claim in ranking.claims.items()
    }
    return Result(ranking, claims, verdicts, answer_line(len(trials), METRIC, points, ranking))


def _number(point: Point) -> int:
    return int(point.settings["lr"])


def _failed(rng: Rng, values: np.ndarray, failures: str) -> np.ndarray:
    """Draws which trials fail; returns booleans of the shape (points, seeds)."""
    seeds = values.shape[1]
    match failures:
        case "at random":
            return rng.random(values.shape) < 0.1
        case "highest tenth":
            return values >= np.quantile(values, 0.9, method="higher")
        case "worst seeds of a point":
            failed = np.zeros(values.shape, bool)
            failed[-1, np.argsort(values[-1])[-max(1, round(0.4 * seeds)) :]] = True
            return failed
    return np.zeros(values.shape, bool)


def _is_contradictory(result: Result) -> bool:
    """Whether the one-line answer disagrees with the order, the differences or the verdicts of the table."""
    line, verdicts, ranked = result.line, result.verdicts, [_number(point) for point in result.ranking.ranked]
    if line.startswith("no "):
        return bool(ranked) and result.ranking.no_best is None
    best = int(re.match(r"best: lr=(\d+)", line)[1])
    mine, difference = verdicts[best], result.claims[best, 0].comparison.difference if (best, 0) in result.claims else 0
    named = {
        "better": "better than the baseline" in line,
        "worse": "worse than" in line,
        "not significant": "no significant difference from the baseline" in line,
    }
    is_told = best == 0 or 0 not in verdicts or any(mine.startswith(word) and found for word, found in named.items())
    overtaken = best == 0 and any(verdict.startswith("better") for verdict in verdicts.values())
    is_left_out = 0 in verdicts and 0 not in ranked and not named["better"]
    return (
        best != ranked[0]
        or named["worse"]
        or overtaken
        or not (is_told or is_left_out)
        or (difference > 0 and not is_left_out)
    )


def tables(draws: int) -> Iterator[tuple[str, str, int, int, Rates]]:
    """Simulates all combinations of noise, failures, points and seeds."""
    for noise, failures, points, seeds in itertools.product(NOISE, FAILURES, POINTS, SEEDS):
        yield noise, failures, points, seeds, simulate(points, seeds, noise, failures, draws)


if __name__ == "__main__":
    for row in tables(int(sys.argv[1])):
        print(*row, flush=True)
