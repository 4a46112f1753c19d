"""Error rates of the results of simulated sweeps, whose true effects are known."""

import itertools

import numpy as np
import pytest

from gptlab.sweeps.analysis import points as points_of_sweep
from simulated_sweeps import FAILURES, NOISE, POINTS, SEEDS, analyze, simulate

DRAWS = 40  # sweeps without an effect and sweeps with one; in all 19,200


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE)
def test_results_are_wrong_in_at_most_7_percent_of_sweeps_and_never_contradict_their_table(noise):
    for failures in FAILURES:
        found = [simulate(points, seeds, noise, failures, DRAWS) for points, seeds in itertools.product(POINTS, SEEDS)]
        assert sum(rates.contradictions for rates in found) == 0
        assert np.mean([rates.alarms for rates in found]) <= 0.07
        assert np.mean([rates.wrong for rates in found]) <= 0.07
        if failures in ("none", "at random"):
            assert np.mean([rates.covered for rates in found]) >= 0.93


@pytest.mark.slow
def test_lost_trials_that_did_not_count_would_cause_false_alarms(monkeypatch):
    assert simulate(2, 10, "normal", "worst seeds of a point", 200).alarms == 0
    monkeypatch.setattr(points_of_sweep, "MAX_LOST", 1.0)
    assert simulate(2, 10, "normal", "worst seeds of a point", 200).alarms > 0.1


def test_point_that_lost_its_hardest_seed_is_not_best_for_it():
    """Without an effect, each of two points is best in half of the sweeps, though one lacks the worst of ten seeds."""
    rng, best = np.random.default_rng(0), []
    for _ in range(200):
        of_seeds = 10 * rng.normal(size=10)
        failed = np.zeros((2, 10), bool)
        failed[1, of_seeds.argmax()] = True
        best.append(analyze(rng.normal(size=(2, 10)) + of_seeds, failed).line.startswith("best: lr=1,"))
    assert 0.4 < np.mean(best) < 0.6
