"""Coverage of the intervals of scaling fits, by simulation; ``pytest -s`` prints the table in docs/answers.md."""

import numpy as np
import pytest

from gptlab.sweeps.analysis.scaling_fit import ScalingLaw, fit_with_intervals

SETS, RESAMPLES = 50, 200
QUANTITIES = (*ScalingLaw._fields, "a")
SMALL = ScalingLaw(E=1.1, A=25.0, B=900.0, alpha=0.3, beta=0.5)
CHINCHILLA = ScalingLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
GRIDS = {  # law, logarithms of the smallest and the largest size and their number, the same of lengths, seeds
    "5 x 5, 1 seed": (SMALL, (4.5, 7, 5), (5, 7.5, 5), 1),
    "4 x 3, 2 seeds": (SMALL, (4.5, 7, 4), (5, 7.5, 3), 2),
    "4 x 4, 3 seeds": (SMALL, (4.5, 7, 4), (5, 7.5, 4), 3),
    "Chinchilla 7 x 7, 1 seed": (CHINCHILLA, (7, 10, 7), (9, 12, 7), 1),
}
NOISE = {  # of log loss
    "normal, 0.3%": lambda random, size: 0.003 * random.normal(size=size),
    "normal, 1%": lambda random, size: 0.01 * random.normal(size=size),
    "t3, 0.3%": lambda random, size: 0.003 * random.standard_t(3, size=size) / np.sqrt(3),
}


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("grid", GRIDS)
def test_intervals_of_synthetic_grids_contain_the_true_coefficients(grid, noise):
    law, sizes, lengths, seeds = GRIDS[grid]
    n, d = (np.repeat(axis.ravel(), seeds) for axis in np.meshgrid(np.logspace(*sizes), np.logspace(*lengths)))
    hits = dict.fromkeys(QUANTITIES, 0)
    for number in range(SETS):
        errors = NOISE[noise](np.random.default_rng((23, number)), len(n))
        fitted = fit_with_intervals(n, d, law.loss(n, d) * np.exp(errors), resamples=RESAMPLES, seed=number)
        for name in QUANTITIES:
            low, high = fitted.interval(lambda one, name=name: getattr(one, name))
            hits[name] += low <= getattr(law, name) <= high
    cells = " | ".join(f"{100 * hits[name] / SETS:.0f}%" for name in QUANTITIES)
    print(f"\n| {grid} | {noise} | {cells} |")
    for name in QUANTITIES:
        assert hits[name] / SETS >= 0.9, name
