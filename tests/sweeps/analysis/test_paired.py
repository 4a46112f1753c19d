"""Comparisons over seeds, against published results, SciPy, and simulations with a known difference."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gptlab.sweeps.analysis.significance import Claim, Comparison, compare, compare_all, estimate, find_step, holm

# Student 1908: hours of sleep gained by ten patients under two drugs
FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def by_seed(values, first=1):
    return {(str(seed),): float(value) for seed, value in enumerate(values, first)}


def test_paired_t_test_matches_r_on_students_data():
    found = compare(by_seed(FIRST), by_seed(SECOND))  # R: t.test(Pair(extra.1, extra.2) ~ 1, data = sleep2)
    assert (found.method, found.n, found.others) == ("paired", 10, 10)
    assert found.difference == pytest.approx(-1.58, abs=1e-12)
    assert found.difference / found.se == pytest.approx(-4.0621, abs=5e-5)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)


def test_welch_test_without_common_seeds_matches_r():
    found = compare(by_seed(FIRST), by_seed(SECOND, first=101))  # R: t.test(extra ~ group, data = sleep)
    assert found.method == "welch"
    assert found.difference / found.se == pytest.approx(-1.8608, abs=5e-5)
    assert found.p == pytest.approx(0.07939, abs=5e-6)
    assert (found.low, found.high) == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)


def test_two_seeds_match_the_cauchy_distribution():
    # mean 0.2, standard error 0.1, t = 2, one degree of freedom
    found = compare(by_seed((0.1, 0.3)), by_seed((0.0, 0.0)))
    assert (found.difference, found.se) == pytest.approx((0.2, 0.1))
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert found.high == pytest.approx(0.2 + 0.1 * math.tan(math.pi * 0.475))
    assert found.low == pytest.approx(0.2 - 0.1 * math.tan(math.pi * 0.475))


@pytest.mark.parametrize(("n", "others"), [(2, 2), (3, 3), (5, 5), (2, 7)])
def test_both_tests_match_scipy(n, others):
    rng = np.random.default_rng(n)
    for _ in range(20):
        mine, theirs = rng.normal(1, 0.1, n), rng.normal(1.05, 0.3, others)
        expected = stats.ttest_ind(mine, theirs, equal_var=False)
        found = compare(by_seed(mine), by_seed(theirs, first=101))
        assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, *expected.confidence_interval()))
        if n == others:
            expected = stats.ttest_rel(mine, theirs)
            found = compare(by_seed(mine), by_seed(theirs))
            assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, *expected.confidence_interval()))


def test_p_value_is_close_to_a_permutation_test():
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.5, 0.8):
        differences = rng.normal(shift, 1, 12)
        signs = np.array(list(itertools.product((1, -1), repeat=12)))
        means = np.abs(signs @ differences)
        exact = np.mean(means >= abs(differences.sum()) - 1e-12)
        assert compare(by_seed(differences), by_seed(np.zeros(12))).p == pytest.approx(exact, abs=0.025)


def test_pairing_removes_the_common_effect_of_seeds():
    seeds = np.random.default_rng(0).normal(0, 0.5, 5)  # much larger than the difference
    own = np.array([0.002, -0.001, 0.0, 0.001, -0.002])
    better, other = by_seed(1.99 + seeds + own), by_seed(2 + seeds)
    assert compare(better, other).p < 0.001
    assert compare(better, by_seed(2 + seeds, first=101)).p > 0.9


def test_only_common_seeds_are_paired():
    point = {("1",): 1.0, ("2",): 2.0, ("3",): 9.0}
    found = compare(point, {("2",): 1.0, ("1",): 0.5, ("4",): -9.0})
    assert (found.method, found.n, found.difference) == ("paired", 2, 0.75)
    assert (compare(point, {("3",): 1.0, ("4",): 2.0}).method, compare(point, {("3",): 1.0, ("4",): 2.0}).n) == (
        "welch",
        3,
    )


def test_one_seed_has_a_difference_without_p_value():
    same = compare({("7",): 1.5}, {("7",): 1.0})
    assert (same.method, same.difference, same.se, same.p, same.low) == ("paired", 0.5, None, None, None)
    of_several = compare({("7",): 1.5}, {("7",): 1.0, ("8",): 2.0})  # by the common seed
    assert (of_several.difference, of_several.p) == (0.5, None)
    assert compare({("7",): 1.5}, {("8",): 1.0, ("9",): 2.0}).difference == 0.0


def test_zero_standard_error_gives_p_value_0_or_1():
    values = by_seed((1.1, 1.2, 1.3))
    same = compare(values, dict(values))
    assert (same.difference, same.se, same.p, same.low, same.high) == (0, 0, 1, 0, 0)
    constant = compare(by_seed((1.5, 2.5)), by_seed((1.0, 2.0)))
    assert (constant.difference, constant.se, constant.p) == (0.5, 0, 0)  # exact values, without a resolution
    flat = compare(by_seed((1.0, 1.0)), by_seed((1.0, 1.0, 1.0), first=11))
    assert (flat.method, flat.p) == ("welch", 1)


def test_step_of_a_metric_is_the_largest_common_divisor_of_differences():
    assert find_step([0.29, 0.31, 0.33, 0.36]) == pytest.approx(0.01)
    assert find_step([100, 350, 900]) == pytest.approx(50)
    assert find_step([3000 / 10042, 3010 / 10042, 3021 / 10042]) == pytest.approx(1 / 10042)
    assert find_step([1.5, 1.5]) == find_step([]) == 0
    losses = np.random.default_rng(0).normal(2, 0.01, 30)
    assert find_step(losses) < 1e-5
    assert find_step([*losses, 6e4]) < 1e-5  # an outlier does not make the others coarse


def test_estimate_matches_hand_computed_values():
    assert estimate([1.0, 2.0, 6.0]) == pytest.approx((3, 3.0, math.sqrt(7 / 3)))  # deviations -2, -1, 3
    assert estimate([1.0, 2.0, 6.0]).deviation == pytest.approx(math.sqrt(7))
    assert estimate([4.0]) == (1, 4.0, None)


def test_reversed_comparison_equals_comparison_of_swapped_points():
    one, other = by_seed(FIRST[:4]), by_seed(SECOND, first=21)
    assert compare(one, other).reversed() == pytest.approx(compare(other, one))


def test_holm_matches_hand_computed_p_values():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_comparison_without_p_value_does_not_count_in_the_correction():
    pair = (by_seed(FIRST), by_seed(SECOND))
    alone = compare(*pair).p
    claims = compare_all({"a": pair, "b": ({("1",): 1.0}, {("1",): 2.0}), "c": pair})
    assert [claims[name].p for name in "abc"] == [pytest.approx(2 * alone), None, pytest.approx(2 * alone)]
    assert [claims[name].is_significant for name in "abc"] == [True, False, True]


def false_alarms(comparisons, seeds, is_paired=True):
    """Counts significant differences between runs that differ only in the seed."""
    rng, alarms, first = np.random.default_rng(1), 0, 1 if is_paired else 101
    for _ in range(comparisons):
        shared = is_paired * rng.normal(0, 1, seeds)
        mine, theirs = (by_seed(shared + rng.normal(0, 1, seeds), first=f) for f in (1, first))
        alarms += compare_all({"": (mine, theirs)})[""].is_significant
    return alarms


@pytest.mark.parametrize("seeds", [2, 5])
def test_at_most_8_of_100_comparisons_without_a_difference_are_false_alarms(seeds):
    assert 0 < false_alarms(100, seeds) <= 8


@pytest.mark.parametrize(("seeds", "is_paired"), [(2, True), (5, True), (2, False), (5, False)])
def test_false_alarm_rate_is_at_most_5_percent(seeds, is_paired):
    within = 3 * math.sqrt(0.05 * 0.95 / 4000)  # three standard deviations of the rate over 4,000 comparisons
    rate = false_alarms(4000, seeds, is_paired) / 4000
    assert rate < 0.05 + within
    assert rate > (0.05 - within if is_paired else 0.01)  # Welch's test is conservative with few seeds


def test_difference_of_three_standard_deviations_is_found_with_five_seeds():
    rng = np.random.default_rng(0)
    found = [compare_all({"": (by_seed(rng.normal(-3, 1, 5)), by_seed(rng.normal(0, 1, 5)))})[""] for _ in range(100)]
    assert sum(claim.is_significant and claim.comparison.difference < 0 for claim in found) >= 90
    differences = [compare_all({"": (by_seed(rng.normal(3, 1, 5)), by_seed(np.zeros(5)))})[""] for _ in range(100)]
    assert sum(claim.is_significant for claim in differences) >= 99


@pytest.mark.parametrize("method", ["paired", "welch"])
def test_recommended_seeds_give_the_stated_power(method):
    """Counts how often simulated sweeps with the recommended number of seeds find a difference of the measured size."""
    difference, deviation, n = 0.02, 0.03, 4  # deviation of the difference of two runs
    se = deviation / n**0.5
    freedom = (n - 1) * (1 if method == "paired" else 2)
    p = 2 * stats.t.sf(difference / se, freedom)
    claim = Claim(Comparison(method, n, n, difference, se, p, None, None), p)
    seeds, rng = claim.seeds_needed(), np.random.default_rng(0)
    shape = (4000, seeds)
    if method == "paired":
        found = stats.ttest_1samp(rng.normal(difference, deviation, shape), 0, axis=1).pvalue
    else:
        each = deviation / 2**0.5
        found = stats.ttest_ind(rng.normal(difference, each, shape), rng.normal(0, each, shape), axis=1).pvalue
    assert 0.78 < (found < 0.05).mean() < 0.86  # at least 0.8, and not many more seeds than that
