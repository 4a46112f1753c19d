"""Fit of the scaling law of Hoffmann et al. 2022 ("Chinchilla") to runs, and the optimal model size for a budget.

N is the number of parameters of a model, D the number of training tokens and C = 6 N D the number of floating-point
operations (section 3.3 of the paper). Imports no torch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from gptlab.errors import UserError

Array = NDArray[np.float64]

# Hoffmann et al. 2022, appendix D.2: delta of the Huber loss, and the grid of starting points
DELTA = 1e-3
START_GRID = {
    "a": np.arange(0, 26, 5.0),
    "b": np.arange(0, 26, 5.0),
    "e": np.arange(-1, 1.1, 0.5),
    "alpha": np.arange(0, 2.1, 0.5),
    "beta": np.arange(0, 2.1, 0.5),
}
GRID_STARTS = 24  # the objective is minimized from the best 24 of the 4,500 grid points
COORDINATES = ("A", "B", "E", "alpha", "beta")  # order of the coordinates of a law, see ``_Runs``
# Bounds of the logs of the three terms at the mean of the runs, and of the exponents. They only prevent overflow.
LOWEST, HIGHEST = np.array([-30, -30, -30, 0.01, 0.01]), np.array([10, 10, 10, 5.0, 5.0])
TOUCHING = 1e-6  # distance from a bound at which a coordinate counts as at the bound
MAX_ITERATIONS = 1000
PATIENCE = 12  # iterations without progress after which a fit has converged; half of them only adapt the damping
PROGRESS = 1e-10  # smallest decrease of the objective, relative to its value, that counts as progress
EQUAL = 1e-3  # difference of objectives below which two laws fit equally well
# Ratios above which the runs do not determine a coefficient: of the ends of its interval, and of its values in laws
# that fit equally well
MAX_SPAN, MAX_EQUAL_SPAN = 2.0, 1.05
MAX_CONDITION = 100  # condition index above which collinearity makes estimates useless; 30 is a moderate one
CONFIDENCE_LEVEL = 0.95
MIN_VALUES = 3  # distinct sizes and lengths: an exponent, a factor and a constant need three
MIN_RUNS = 6  # one more than coefficients: otherwise the law has no residuals, which the intervals are based on
LARGEST = 300.0  # largest logarithm of G, which prevents overflow


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
        logarithm = math.log(self.alpha * self.A / (self.beta * self.B)) / (self.alpha + self.beta)
        return math.exp(max(-LARGEST, min(LARGEST, logarithm)))

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
        undetermined: Names of the coefficients that the runs do not determine (see ``_undetermined``).
    """

    law: ScalingLaw
    resampled: list[ScalingLaw]
    runs: int
    residual: float
    undetermined: tuple[str, ...]

    @property
    def has_optimum(self) -> bool:
        """Whether the runs determine the coefficients that the optimal N and D depend on: all but E (equation 4)."""
        return set(self.undetermined) <= {"E"}

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
        loss: Predicted loss, in nats per token; None if the runs do not determine E.
    """

    flops: float
    parameters: tuple[float, float, float]
    tokens: tuple[float, float, float]
    loss: tuple[float, float, float] | None


def fit_scaling_law(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """Fits the law to runs: minimizes the Huber loss between log losses from a grid of starting points (appendix D.2).

    Args:
        parameters: N of every run.
        tokens: D of every run.
        losses: Loss of every run, in nats per token.

    Raises:
        ValueError: A value is not finite or not positive, or the arguments differ in length.
        UserError: There are too few runs, sizes or lengths to determine the five coefficients.
    """
    runs = _Runs(parameters, tokens, losses)
    ends, values = runs.minimize(runs.best_starts(GRID_STARTS), np.ones((GRID_STARTS, len(losses))))
    return runs.law(ends[values.argmin()])


def fit_with_intervals(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], *, resamples: int, seed: int
) -> ScalingFit:
    """Fits the law to runs and to bootstrap samples of them, for intervals.

    A sample with too few sizes or lengths for a fit is drawn again. The fit to a sample starts from one of the laws
    that fit all runs equally well, a different one for each sample, and from the best point of the grid. If the two
    results fit the sample equally well, every other sample takes the second one. So if several laws fit, as when D is
    proportional to N in all runs, the intervals contain them.

    Args:
        parameters: N of every run.
        tokens: D of every run.
        losses: Loss of every run, in nats per token.
        resamples: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        ValueError: A value is not finite or not positive, or the arguments differ in length.
        UserError: There are too few runs, sizes or lengths to determine the five coefficients.
    """
    runs = _Runs(parameters, tokens, losses)
    starts = runs.best_starts(GRID_STARTS)
    ends, values = runs.minimize(starts, np.ones((GRID_STARTS, len(losses))))
    equal = ends[values <= values.min() + EQUAL]
    draws = runs.bootstrap_weights(np.random.default_rng(seed))
    weights = np.array([next(draws) for _ in range(resamples)])
    first, first_values = runs.minimize(equal[np.arange(resamples) % len(equal)], weights)
    second, second_values = runs.minimize(np.repeat(starts[:1], resamples, axis=0), weights)
    takes_second = second_values < first_values + np.where(np.arange(resamples) % 2, EQUAL, -EQUAL)
    resampled = np.where(takes_second[:, None], second, first)
    best = ends[values.argmin()]
    return ScalingFit(
        law=runs.law(best),
        resampled=[runs.law(at) for at in resampled],
        runs=len(losses),
        residual=float(np.sqrt(np.mean(runs.residuals(best[None])[0] ** 2)) * DELTA),
        undetermined=_undetermined(resampled, equal, runs.jacobian(best[None])[0]),
    )


def optimum(fitted: ScalingFit, flops: float) -> Optimum:
    """Returns the optimum for a budget of floating-point operations, with intervals."""

    def with_interval(quantity: Callable[[ScalingLaw], float]) -> tuple[float, float, float]:
        return (quantity(fitted.law), *fitted.interval(quantity))

    return Optimum(
        flops,
        parameters=with_interval(lambda law: law.optimum(flops)[0]),
        tokens=with_interval(lambda law: law.optimum(flops)[1]),
        loss=None if "E" in fitted.undetermined else with_interval(lambda law: law.loss(*law.optimum(flops))),
    )


def _undetermined(resampled: Array, equal: Array, jacobian: Array) -> tuple[str, ...]:
    """Returns the names of the coefficients that the runs do not determine.

    These are the coefficients whose 95% interval spans more than a factor of ``MAX_SPAN`` or reaches a bound of the
    fit, those that differ between laws that fit all runs equally well, and those that are collinear: the condition
    index is above ``MAX_CONDITION``, and most of their variance belongs to such indices (Belsley, Kuh and Welsch 1980,
    section 3.2). A and B are judged by their terms at the mean of the runs: A and B themselves are extrapolations to
    N = 1 and D = 1.

    Args:
        resampled: Coordinates (F, 5) of the laws fitted to bootstrap samples.
        equal: Coordinates (F, 5) of the laws that fit all runs equally well.
        jacobian: Derivatives (R, 5) of the residuals at the law fitted to all runs.
    """
    low, high = np.percentile(resampled, (50 * (1 - CONFIDENCE_LEVEL), 50 * (1 + CONFIDENCE_LEVEL)), axis=0)
    is_free = (low <= LOWEST + TOUCHING) | (high >= HIGHEST - TOUCHING)
    for lower, upper, limit in ((low, high, MAX_SPAN), (equal.min(axis=0), equal.max(axis=0), MAX_EQUAL_SPAN)):
        is_free |= np.append(np.exp(upper - lower)[:3], (upper / lower)[3:]) > limit
    _, singular, directions = np.linalg.svd(jacobian / np.linalg.norm(jacobian, axis=0), full_matrices=False)
    variances = (directions / np.maximum(singular, 1e-12)[:, None]) ** 2
    is_collinear = (variances / variances.sum(axis=0))[singular * MAX_CONDITION < singular[0]].sum(axis=0) > 0.5
    is_free |= is_collinear & (np.array(COORDINATES) != "E")  # E is also collinear with a term that is not needed
    return tuple(name for name in ScalingLaw._fields if is_free[COORDINATES.index(name)])


class _Runs:
    """Runs to which a law is fitted, and the minimization of its Huber loss for several weightings of them at once.

    Coordinates are the logs of the terms A / N^alpha, B / D^beta and E at the geometric mean of N and D, then alpha and
    beta. The logs of N and D are centered at that mean, which removes the correlation of log A with alpha and of log B
    with beta.

    Shapes: F fits, R runs.
    """

    def __init__(self, parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> None:
        columns = {"parameters": parameters, "tokens": tokens, "losses": losses}
        for name, values in columns.items():
            wrong = [f"{name}[{i}] = {value}" for i, value in enumerate(values) if not 0 < value < np.inf]
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: a scaling law is fitted to positive finite numbers.")
        if len({len(values) for values in columns.values()}) > 1:
            lengths = ", ".join(f"{len(values)} {name}" for name, values in columns.items())
            raise ValueError(f"{lengths}: a scaling law needs one of each per run.")
        self.places = [np.unique(values, return_inverse=True)[1] for values in (parameters, tokens)]
        sizes, budgets = (len(set(place)) for place in self.places)
        if sizes < MIN_VALUES or budgets < MIN_VALUES or len(losses) < MIN_RUNS:
            raise UserError(
                f"{len(losses)} runs of {sizes} sizes and {budgets} lengths are too few to fit a scaling law. It "
                f"needs at least {MIN_RUNS} runs, {MIN_VALUES} sizes and {MIN_VALUES} lengths."
            )
        logs = np.log(np.array([parameters, tokens], dtype=np.float64))
        self.means = logs.mean(axis=1)
        self.n, self.d = logs - self.means[:, None]
        self.losses = np.log(np.array(losses, dtype=np.float64))

    def law(self, at: Array) -> ScalingLaw:
        """Returns the law with coordinates (5,)."""
        A, B, E = (float(value) for value in np.exp(at[:3] + np.append(at[3:] * self.means, 0.0)))  # noqa: N806
        return ScalingLaw(E, A, B, float(at[3]), float(at[4]))

    def bootstrap_weights(self, random: np.random.Generator) -> Iterator[Array]:
        """Yields how often each run is in a bootstrap sample (R,), of samples with enough sizes and lengths."""
        number = len(self.losses)
        while True:
            drawn = random.integers(number, size=number)
            if all(len(set(place[drawn])) >= MIN_VALUES for place in self.places):
                yield np.bincount(drawn, minlength=number).astype(np.float64)

    def best_starts(self, number: int) -> Array:
        """Returns the coordinates (number, 5) of the points of the starting grid with the lowest Huber loss."""
        grid = np.array(list(product(*START_GRID.values())))
        grid[:, :2] -= grid[:, 3:] * self.means
        values = special.huber(1.0, self.residuals(grid)).sum(axis=1)
        return grid[np.argsort(values, kind="stable")[:number]]

    def residuals(self, at: Array) -> Array:
        """Returns log(predicted / measured) / DELTA (F, R) for coordinates (F, 5)."""
        return (np.logaddexp.reduce(self._terms(at)) - self.losses) / DELTA

    def jacobian(self, at: Array) -> Array:
        """Returns the derivatives (F, R, 5) of the residuals with respect to the coordinates (F, 5)."""
        terms = self._terms(at)
        shares = np.exp(terms - np.logaddexp.reduce(terms))  # (3, F, R)
        return np.stack((*shares, -shares[0] * self.n, -shares[1] * self.d), axis=-1) / DELTA

    def minimize(self, starts: Array, weights: Array) -> tuple[Array, Array]:
        """Minimizes the Huber loss, divided by DELTA squared and summed over the runs, from each starting point.

        Uses the Levenberg-Marquardt method (Marquardt 1963) with iteratively reweighted least squares for the Huber
        loss (Holland and Welsch 1977). All fits are computed at once in NumPy, so no BLAS threads are started. The loss
        is summed, not averaged: a tolerance for the average made the published fit stop too early (Besiroglu et al.
        2024, section 4).

        Args:
            starts: Coordinates (F, 5).
            weights: Weight of each run in each fit (F, R).

        Returns:
            The coordinates (F, 5) at the minima, and the Huber losses (F,).
        """
        at, damping = np.clip(starts, LOWEST, HIGHEST), np.full(len(starts), 1e-2)
        waited = np.zeros(len(starts), dtype=int)
        values = self._objective(at, weights)
        for _ in range(MAX_ITERATIONS):
            going = np.flatnonzero(waited < PATIENCE)
            if not len(going):
                break
            own = weights[going]
            step = self._step(at[going], own, damping[going])
            tried = np.clip(at[going] + step, LOWEST, HIGHEST)
            found = self._objective(tried, own)
            decrease = values[going] - found
            better = decrease > 0
            at[going[better]], values[going[better]] = tried[better], found[better]
            damping[going] = np.clip(np.where(better, damping[going] / 5, damping[going] * 4), 1e-9, 1e12)
            waited[going] = np.where(decrease > PROGRESS * np.maximum(found, 1), 0, waited[going] + 1)
        return at, values

    def _step(self, at: Array, weights: Array, damping: Array) -> Array:
        """Returns the steps (F, 5) of the Levenberg-Marquardt method; coordinates that would leave a bound are kept."""
        residuals, jacobian = self.residuals(at), self.jacobian(at)
        weighted = jacobian * (weights / np.maximum(1, np.abs(residuals)))[..., None]
        gradient = np.einsum("frk,fr->fk", weighted, residuals)
        hessian = np.einsum("frk,frl->fkl", weighted, jacobian)
        kept = ((at <= LOWEST) & (gradient > 0)) | ((at >= HIGHEST) & (gradient < 0))
        hessian *= ~kept[:, :, None] & ~kept[:, None, :]
        diagonal = np.einsum("fkk->fk", hessian)  # a view
        diagonal += damping[:, None] * diagonal + 1e-12 + kept
        return -np.linalg.solve(hessian, (gradient * ~kept)[..., None])[..., 0]

    def _objective(self, at: Array, weights: Array) -> Array:
        return (weights * special.huber(1.0, self.residuals(at))).sum(axis=1)

    def _terms(self, at: Array) -> Array:
        """Returns the logs of the three terms of the predicted losses (3, F, R)."""
        a, b, e, alpha, beta = at.T[..., None]
        return np.stack(np.broadcast_arrays(a - alpha * self.n, b - beta * self.d, e))
