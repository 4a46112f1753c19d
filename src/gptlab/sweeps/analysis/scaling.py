"""Scaling laws: the loss of Hoffmann et al. 2022 ("Chinchilla") fitted to runs, and what is best for a budget.

N are the parameters of a model, D the tokens that it is trained on, C = 6 N D the floating-point operations that takes
(section 3.3 there). Imports no torch.
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

# Hoffmann et al. 2022, appendix D.2: the Huber loss's delta, and where L-BFGS begins
DELTA = 1e-3
START_GRID = {
    "a": np.arange(0, 26, 5.0),
    "b": np.arange(0, 26, 5.0),
    "e": np.arange(-1, 1.1, 0.5),
    "alpha": np.arange(0, 2.1, 0.5),
    "beta": np.arange(0, 2.1, 0.5),
}
GRID_STARTS = 24  # of those 4,500 beginnings, so many are followed: those with the least loss
RESTARTS = 1  # and resampled runs begin there, and at the law of all runs
LBFGS_OPTIONS = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-11, "gtol": 1e-7, "maxcor": 20}  # of L-BFGS
# Logs of the three terms at the middle of the runs, and the powers: beyond what runs can tell, near enough for floats.
BOUNDS = [(-30, 10), (-30, 10), (-30, 10), (0.01, 5), (0.01, 5)]
CONFIDENCE_LEVEL = 0.95  # of intervals
MIN_RUNS = 3  # sizes, and lengths: a power and a constant are not told apart by less


class ScalingLaw(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta (equation 10 of appendix D.2, equation 2 of section 3.3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """Power with which the best N grows with C (equation 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Power with which the best D grows with C (equation 4)."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:  # noqa: N802  (its name in equation 4)
        """Factor of the best N (equation 4)."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def loss(self, parameters: float, tokens: float) -> float:
        """Predict a loss, in nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Returns the parameters and the tokens of the lowest loss for a budget of operations (equation 4)."""
        return self.G * (flops / 6) ** self.a, (flops / 6) ** self.b / self.G


class ScalingFit(NamedTuple):
    """Fitted law, with its resampled fits.

    Attributes:
        law: Fitted to all runs.
        resampled: Fitted to as many runs, drawn from these with replacement (Efron 1979).
        runs: How many there were.
        residual: Root of the mean square of log(measured / predicted).
    """

    law: ScalingLaw
    resampled: list[ScalingLaw]
    runs: int
    residual: float

    def interval(self, of: Callable[[ScalingLaw], float]) -> tuple[float, float]:
        """Returns the ends of the 95 % interval of something that a law says, by percentiles of the resampled ones."""
        ends = (50 * (1 - CONFIDENCE_LEVEL), 50 * (1 + CONFIDENCE_LEVEL))
        low, high = np.percentile([of(law) for law in self.resampled], ends)
        return float(low), float(high)


@dataclass(frozen=True)
class Optimum:
    """What is best for a budget: each of the law that fits all runs, then the ends of its 95 % interval.

    Attributes:
        flops: The budget C.
        parameters: Of the model.
        tokens: To train it on.
        loss: That it comes to, nats per token.
    """

    flops: float
    parameters: tuple[float, float, float]
    tokens: tuple[float, float, float]
    loss: tuple[float, float, float]


def fit_scaling_law(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """Fits the law to runs: the least Huber loss between logs, by L-BFGS from a grid (appendix D.2).

    Args:
        parameters: N of every run.
        tokens: D of every run.
        losses: That they came to, nats per token.

    Raises:
        UserError: There are too few runs, sizes or lengths to tell the five coefficients.
    """
    logs = _logs(parameters, tokens, losses)
    sizes, lengths = len(set(parameters)), len(set(tokens))
    if sizes < MIN_RUNS or lengths < MIN_RUNS or len(losses) < len(ScalingLaw._fields):
        raise UserError(
            f"A scaling law has {len(ScalingLaw._fields)} coefficients, and {len(losses)} runs of {sizes} sizes and "
            f"{lengths} lengths cannot determine them. It takes as many runs, of at least {MIN_RUNS} sizes and "
            f"{MIN_RUNS} lengths."
        )
    return _descend(logs, _best_starts(logs, GRID_STARTS))


def fit_with_intervals(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], *, resamples: int, seed: int
) -> ScalingFit:
    """Fits the law to runs, and again to runs drawn from them, for intervals.

    A draw that has too few sizes or lengths for a law is drawn again.

    Args:
        parameters: N of every run.
        tokens: D of every run.
        losses: That they came to, nats per token.
        resamples: How often to draw.
        seed: Of the draws.

    Raises:
        UserError: There are too few runs, sizes or lengths to tell the five coefficients.
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
    """Returns the optimum for a budget of operations."""

    def with_interval(of: Callable[[ScalingLaw], float]) -> tuple[float, float, float]:
        return (of(fitted.law), *fitted.interval(of))

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
    """Returns the parameters that L-BFGS optimizes: a = log A, b = log B, e = log E, alpha, beta."""
    return np.array([*np.log([law.A, law.B, law.E]), law.alpha, law.beta])


def _law(at: Array) -> ScalingLaw:
    A, B, E = (float(value) for value in np.exp(at[:3]))  # noqa: N806
    return ScalingLaw(E, A, B, float(at[3]), float(at[4]))


def _terms(at: Array, logs: Array) -> Array:
    """Returns the logs of the three terms of the predicted loss of every run, as a (3, runs) array."""
    a, b, e, alpha, beta = at
    return np.stack((a - alpha * logs[0], b - beta * logs[1], np.full_like(logs[0], e)))


def _residuals(at: Array, logs: Array) -> Array:
    return np.logaddexp.reduce(_terms(at, logs)) - logs[2]


def _objective(at: Array, logs: Array) -> tuple[float, Array]:
    """Returns the Huber loss over delta squared, summed over the runs, and its gradient.

    Summed and scaled, not averaged: L-BFGS stops where the loss moves little in absolute terms, which is how the
    published fit came to stop too soon (Besiroglu et al. 2024, section 4).
    """
    terms = _terms(at, logs)
    predicted = np.logaddexp.reduce(terms)
    residuals = (predicted - logs[2]) / DELTA
    pull = np.clip(residuals, -1, 1) / DELTA  # the derivative of the Huber loss
    shares = pull * np.exp(terms - predicted)  # of the three terms in it, (3, runs)
    gradient = [*shares.sum(axis=1), -shares[0] @ logs[0], -shares[1] @ logs[1]]
    return float(special.huber(1.0, residuals).sum()), np.array(gradient)


def _best_starts(logs: Array, number: int) -> Array:
    """Returns the starting points of the grid with the least Huber loss."""
    grid = np.array(list(product(*START_GRID.values())))
    terms = np.stack(
        np.broadcast_arrays(
            grid[:, :1] - grid[:, 3:4] * logs[0], grid[:, 1:2] - grid[:, 4:5] * logs[1], grid[:, 2:3] + 0 * logs[0]
        )
    )
    values = special.huber(1.0, (np.logaddexp.reduce(terms) - logs[2]) / DELTA).sum(axis=1)
    return grid[np.argsort(values, kind="stable")[:number]]


def _descend(logs: Array, starts: Array) -> ScalingLaw:
    """Follow each beginning to its minimum, and take the lowest.

    The logs of N and D are taken from their means on the way, which leaves the minimum where it is: else a and alpha, b
    and beta could only move together, which L-BFGS does slowly.
    """
    means = logs[:2].mean(axis=1)
    centred = logs - np.array([[*means, 0.0]]).T
    found = []
    for start in starts:
        at = start.copy()
        at[:2] -= at[3:5] * means
        found.append(
            optimize.minimize(
                _objective, at, args=(centred,), jac=True, method="L-BFGS-B", bounds=BOUNDS, options=LBFGS_OPTIONS
            )
        )
    at = min(found, key=lambda result: result.fun).x
    at[:2] += at[3:5] * means
    return _law(at)


def _bootstrap_samples(runs: Array, random: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yields the indices of resampled runs, always enough of them for a fit."""
    while True:
        drawn = random.integers(runs.shape[1], size=(runs.shape[1],))
        if all(len(np.unique(row[drawn])) >= MIN_RUNS for row in runs[:2]):
            yield drawn
