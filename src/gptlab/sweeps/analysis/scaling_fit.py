"""Fit of the scaling law of Hoffmann et al. 2022 ("Chinchilla") to runs, and the optimal model size for a budget.

N is the number of parameters of a model, D the number of training tokens and C = 6 N D the number of floating-point
operations (section 3.3 of the paper). Imports no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from gptlab.errors import UserError

Array = NDArray[np.float64]

# Hoffmann et al. 2022, appendix D.2: delta of the Huber loss, and the grid of starting points of L-BFGS
DELTA = 1e-3
START_GRID = {
    "a": np.arange(0, 26, 5.0),
    "b": np.arange(0, 26, 5.0),
    "e": np.arange(-1, 1.1, 0.5),
    "alpha": np.arange(0, 2.1, 0.5),
    "beta": np.arange(0, 2.1, 0.5),
}
GRID_STARTS = 24  # L-BFGS is run from the best 24 of the 4,500 grid points
RESTARTS = 1  # fits to resampled runs start from the law of all runs and from this many grid points
LBFGS_OPTIONS = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-11, "gtol": 1e-7, "maxcor": 20}
# Bounds of the logs of the three terms at the mean of the runs, and of the exponents. They only prevent overflow.
BOUNDS = [(-30, 10), (-30, 10), (-30, 10), (0.01, 5), (0.01, 5)]
CONFIDENCE_LEVEL = 0.95
MIN_RUNS = 3  # distinct sizes and lengths: an exponent, a factor and a constant need three


class ScalingLaw(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta (equation 10 of appendix D.2, equation 2 of section 3.3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """Exponent of the optimal N in C (equation 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the optimal D in C (equation 4)."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:  # noqa: N802  (its name in equation 4)
        """Factor of the optimal N (equation 4)."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def loss(self, parameters: float, tokens: float) -> float:
        """Returns the predicted loss, in nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Returns N and D with the lowest loss for a budget of floating-point operations (equation 4)."""
        return self.G * (flops / 6) ** self.a, (flops / 6) ** self.b / self.G


class ScalingFit(NamedTuple):
    """Fitted law, with bootstrap fits.

    Attributes:
        law: Law fitted to all runs.
        resampled: Laws fitted to bootstrap samples of the runs (Efron 1979).
        runs: Number of runs.
        residual: Root mean square of log(measured / predicted).
    """

    law: ScalingLaw
    resampled: list[ScalingLaw]
    runs: int
    residual: float

    def interval(self, quantity: Callable[[ScalingLaw], float]) -> tuple[float, float]:
        """Returns the ends of the 95% interval of a quantity of the law: percentiles over the bootstrap fits."""
        ends = (50 * (1 - CONFIDENCE_LEVEL), 50 * (1 + CONFIDENCE_LEVEL))
        low, high = np.percentile([quantity(law) for law in self.resampled], ends)
        return float(low), float(high)


@dataclass(frozen=True)
class Optimum:
    """Optimal model size and tokens for a budget: each value with the lower and upper end of its 95% interval.

    Attributes:
        flops: Budget C, in floating-point operations.
        parameters: Optimal number of parameters.
        tokens: Optimal number of training tokens.
        loss: Predicted loss, in nats per token.
    """

    flops: float
    parameters: tuple[float, float, float]
    tokens: tuple[float, float, float]
    loss: tuple[float, float, float]


def fit_scaling_law(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """Fits the law to runs: minimizes the Huber loss between log losses with L-BFGS from a grid (appendix D.2).

    Args:
        parameters: N of every run.
        tokens: D of every run.
        losses: Loss of every run, in nats per token.

    Raises:
        UserError: There are too few runs, sizes or lengths to determine the five coefficients.
    """
    logs = _logs(parameters, tokens, losses)
    sizes, lengths = len(set(parameters)), len(set(tokens))
    if sizes < MIN_RUNS or lengths < MIN_RUNS or len(losses) < len(ScalingLaw._fields):
        raise UserError(
            f"{len(losses)} runs of {sizes} sizes and {lengths} lengths are too few to fit a scaling law. It needs at "
            f"least {len(ScalingLaw._fields)} runs, {MIN_RUNS} sizes and {MIN_RUNS} lengths."
        )
    return _descend(logs, _best_starts(logs, GRID_STARTS))


def fit_with_intervals(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], *, resamples: int, seed: int
) -> ScalingFit:
    """Fits the law to runs and to bootstrap samples of them, for intervals.

    A sample with too few sizes or lengths for a fit is drawn again.

    Args:
        parameters: N of every run.
        tokens: D of every run.
        losses: Loss of every run, in nats per token.
        resamples: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        UserError: There are too few runs, sizes or lengths to determine the five coefficients.
    """
    law = fit_scaling_law(parameters, tokens, losses)
    runs = np.array([parameters, tokens, losses], dtype=np.float64)
    draws = _bootstrap_samples(runs, np.random.default_rng(seed))
    starts = np.stack((_coordinates(law), *_best_starts(_logs(*runs), RESTARTS)))
    resampled = [_descend(_logs(*runs[:, next(draws)]), starts) for _ in range(resamples)]
    return ScalingFit(
        law, resampled, len(losses), float(np.sqrt(np.mean(_residuals(_coordinates(law), _logs(*runs)) ** 2)))
    )


def optimum(fitted: ScalingFit, flops: float) -> Optimum:
    """Returns the optimum for a budget of floating-point operations, with intervals."""

    def with_interval(quantity: Callable[[ScalingLaw], float]) -> tuple[float, float, float]:
        return (quantity(fitted.law), *fitted.interval(quantity))

    return Optimum(
        flops,
        parameters=with_interval(lambda law: law.optimum(flops)[0]),
        tokens=with_interval(lambda law: law.optimum(flops)[1]),
        loss=with_interval(lambda law: law.loss(*law.optimum(flops))),
    )


def _logs(
    parameters: Sequence[float] | Array, tokens: Sequence[float] | Array, losses: Sequence[float] | Array
) -> Array:
    return np.log(np.array([parameters, tokens, losses], dtype=np.float64))


def _coordinates(law: ScalingLaw) -> Array:
    """Returns the variables that L-BFGS optimizes: a = log A, b = log B, e = log E, alpha, beta."""
    return np.array([*np.log([law.A, law.B, law.E]), law.alpha, law.beta])


def _law(at: Array) -> ScalingLaw:
    A, B, E = (float(value) for value in np.exp(at[:3]))  # noqa: N806
    return ScalingLaw(E, A, B, float(at[3]), float(at[4]))


def _terms(at: Array, logs: Array) -> Array:
    """Returns the logs of the three terms of the predicted losses, as a (3, runs) array."""
    a, b, e, alpha, beta = at
    return np.stack((a - alpha * logs[0], b - beta * logs[1], np.full_like(logs[0], e)))


def _residuals(at: Array, logs: Array) -> Array:
    return np.logaddexp.reduce(_terms(at, logs)) - logs[2]


def _objective(at: Array, logs: Array) -> tuple[float, Array]:
    """Returns the Huber loss divided by delta squared, summed over the runs, and its gradient.

    It is summed and scaled, not averaged: L-BFGS stops when the absolute change of the objective is small, which made
    the published fit stop too early (Besiroglu et al. 2024, section 4).
    """
    terms = _terms(at, logs)
    predicted = np.logaddexp.reduce(terms)
    residuals = (predicted - logs[2]) / DELTA
    derivative = np.clip(residuals, -1, 1) / DELTA  # of the Huber loss
    by_term = derivative * np.exp(terms - predicted)  # (3, runs)
    gradient = [*by_term.sum(axis=1), -by_term[0] @ logs[0], -by_term[1] @ logs[1]]
    return float(special.huber(1.0, residuals).sum()), np.array(gradient)


def _best_starts(logs: Array, number: int) -> Array:
    """Returns the points of the starting grid with the lowest Huber loss."""
    grid = np.array(list(product(*START_GRID.values())))
    terms = np.stack(
        np.broadcast_arrays(
            grid[:, :1] - grid[:, 3:4] * logs[0], grid[:, 1:2] - grid[:, 4:5] * logs[1], grid[:, 2:3] + 0 * logs[0]
        )
    )
    values = special.huber(1.0, (np.logaddexp.reduce(terms) - logs[2]) / DELTA).sum(axis=1)
    return grid[np.argsort(values, kind="stable")[:number]]


def _descend(logs: Array, starts: Array) -> ScalingLaw:
    """Minimizes the objective from each starting point and returns the best law.

    The logs of N and D are centered first. This does not change the minimum, but removes the correlation of a with
    alpha and of b with beta, which slows L-BFGS down.
    """
    means = logs[:2].mean(axis=1)
    centered = logs - np.array([[*means, 0.0]]).T
    found = []
    for start in starts:
        at = start.copy()
        at[:2] -= at[3:5] * means
        found.append(
            optimize.minimize(
                _objective, at, args=(centered,), jac=True, method="L-BFGS-B", bounds=BOUNDS, options=LBFGS_OPTIONS
            )
        )
    at = min(found, key=lambda result: result.fun).x
    at[:2] += at[3:5] * means
    return _law(at)


def _bootstrap_samples(runs: Array, random: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yields the run indices of bootstrap samples that have enough sizes and lengths for a fit."""
    while True:
        drawn = random.integers(runs.shape[1], size=(runs.shape[1],))
        if all(len(np.unique(row[drawn])) >= MIN_RUNS for row in runs[:2]):
            yield drawn
