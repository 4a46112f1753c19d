"""Scaling laws, against data with a known law, other optimizers and published results."""

import json
import math
import os

import numpy as np
import pytest
from scipy import optimize

from gptlab.errors import UserError
from gptlab.sweeps.analysis.report import report_sweep
from gptlab.sweeps.analysis.scaling_fit import ScalingLaw, fit_scaling_law, fit_with_intervals, optimum
from gptlab.sweeps.analysis.scaling_report import ModelSize, ScalingAnswer, fit_sweep, read_sized_runs
from sweep_directories import trial, write_model, write_sweep

# Hoffmann et al. 2022, equation 10, with the values of nanoGPT's scaling_laws.ipynb
CHINCHILLA = ScalingLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
SMALL = ScalingLaw(E=1.1, A=25.0, B=900.0, alpha=0.3, beta=0.5)  # for runs on a laptop


def runs_of(law, sizes, lengths, noise=0.0, seed=0):
    n, d = (grid.ravel() for grid in np.meshgrid(np.logspace(*sizes), np.logspace(*lengths)))
    errors = np.random.default_rng(seed).normal(0, noise, len(n)) if noise else 0
    return n, d, law.loss(n, d) * np.exp(errors)


@pytest.mark.parametrize(
    ("law", "sizes", "lengths"),
    [(CHINCHILLA, (7, 11, 9), (9, 12, 9)), (SMALL, (4.5, 7, 6), (5, 7.5, 6))],
    ids=["chinchilla", "small"],
)
@pytest.mark.parametrize(("noise", "within"), [(0, 1e-4), (3e-4, 0.02)])
def test_fit_recovers_known_coefficients(law, sizes, lengths, noise, within):
    assert fit_scaling_law(*runs_of(law, sizes, lengths, noise)) == pytest.approx(law, rel=within)


def huber(law, n, d, losses):
    """Objective of appendix D.2, as written there."""
    errors = np.abs(np.log(law.loss(n, d)) - np.log(losses))
    return np.where(errors <= 1e-3, errors**2 / 2, 1e-3 * (errors - 1e-3 / 2)).sum()


def test_fit_is_the_minimum_of_the_huber_loss_and_robust_to_outliers():
    n, d, losses = runs_of(CHINCHILLA, (7, 11, 7), (9, 12, 7), noise=1e-3)
    losses[[3, 20, 40]] *= 1.2
    found = fit_scaling_law(n, d, losses)

    def residuals(at):
        return np.log(ScalingLaw(*np.exp(at[:3]), *at[3:]).loss(n, d)) - np.log(losses)

    begin = [*np.log(CHINCHILLA[:3]), *CHINCHILLA[3:]]
    options = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15, "max_nfev": 5000}
    at = optimize.least_squares(residuals, begin, loss="huber", f_scale=1e-3, x_scale="jac", **options).x
    other = ScalingLaw(*np.exp(at[:3]), *at[3:])
    assert huber(found, n, d, losses) <= huber(other, n, d, losses) * (1 + 1e-9)
    assert found == pytest.approx(other, rel=0.01)
    assert (found.alpha, found.beta) == pytest.approx((0.34, 0.28), rel=0.02)


@pytest.mark.parametrize("law", [CHINCHILLA, SMALL, ScalingLaw(0.5, 3.0, 4000.0, 0.2, 0.7)])
@pytest.mark.parametrize("flops", [1e14, 5.76e23])
def test_optimum_matches_numerical_minimization(law, flops):
    def along(log_n):
        return law.loss(math.exp(log_n), flops / 6 / math.exp(log_n))

    lowest = optimize.minimize_scalar(along, bracket=(5, 30), options={"xtol": 1e-12})
    n, d = law.optimum(flops)
    assert 6 * n * d == pytest.approx(flops)
    assert law.loss(n, d) == pytest.approx(lowest.fun, rel=1e-12)
    assert math.log(n) == pytest.approx(lowest.x, abs=1e-4)


def test_optimum_matches_nanogpt_table():
    """karpathy/nanoGPT, scaling_laws.ipynb: results of grid searches with 16 and 256 points per decade."""
    grid = runs_of(CHINCHILLA, (7, 11, 17), (9, 12, 13))  # sizes and lengths of its table of losses
    law = fit_scaling_law(*grid)
    n, d = law.optimum(2.21e19)  # "best model size: 316.23M, best dataset size: 11.65B"
    sixteenth = 10 ** (1 / 16)
    assert 316.23e6 / sixteenth < n < 316.23e6 * sixteenth
    assert 11.65e9 / sixteenth < d < 11.65e9 * sixteenth
    n, d = law.optimum(3.459892e19)  # "model size: 399.54M, dataset size: 14.43B, flops: 3.459892e+19, loss: 2.76"
    step = 10 ** (1 / 256) - 1
    assert (n, d) == pytest.approx((399.54e6, 14.43e9), rel=step)
    assert f"{law.loss(n, d):.2f}" == "2.76"


def test_intervals_contain_the_true_values_and_shrink_with_the_noise():
    widths = []
    for noise in (3e-3, 3e-4):
        fitted = fit_with_intervals(*runs_of(SMALL, (4.5, 7, 5), (5, 7.5, 5), noise), resamples=60, seed=1)
        for name in ("E", "alpha", "beta", "a", "b"):
            low, high = fitted.interval(lambda law, name=name: getattr(law, name))
            assert low < getattr(SMALL, name) < high
        best = optimum(fitted, 1e15)
        for (value, low, high), truth in zip((best.parameters, best.tokens), SMALL.optimum(1e15), strict=True):
            assert low < truth < high
            assert low <= value <= high
        assert best.loss[1] < SMALL.loss(*SMALL.optimum(1e15)) < best.loss[2]
        assert fitted.residual == pytest.approx(noise, rel=0.4)
        low, high = fitted.interval(lambda law: law.alpha)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_same_seed_draws_the_same_bootstrap_samples():
    runs = runs_of(SMALL, (4.5, 7, 4), (5, 7.5, 4), 1e-3)
    first, again, other = (fit_with_intervals(*runs, resamples=3, seed=seed).resampled for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("name", ["parameters", "tokens", "losses"])
def test_values_that_are_not_positive_and_finite_raise(name, wrong):
    runs = dict(
        zip(("parameters", "tokens", "losses"), map(list, runs_of(SMALL, (4.5, 7, 4), (5, 7.5, 4))), strict=True)
    )
    runs[name][5] = wrong
    for fit in (fit_scaling_law, lambda *args: fit_with_intervals(*args, resamples=2, seed=0)):
        with pytest.raises(ValueError, match=rf"{name}\[5\] = {wrong}"):
            fit(*runs.values())


def test_chinchilla_points_give_the_published_law():
    """Besiroglu et al. 2024, table 1: estimates and standard errors, from figure 4 of the Chinchilla paper."""
    path = os.environ.get("GPTLAB_CHINCHILLA")
    if path is None:
        pytest.skip("GPTLAB_CHINCHILLA=<points.csv of epoch-research/analyzing-chinchilla> is not set")
    n, flops, losses = np.loadtxt(path, delimiter=",", skiprows=1).T
    kept = np.argsort(losses)[:-5]
    n, flops, losses = n[kept], flops[kept], losses[kept]
    fitted = fit_with_intervals(n, flops / 6 / n, losses, resamples=200, seed=0)
    published = ScalingLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
    found = (fitted.law.E, fitted.law.alpha, fitted.law.beta)
    assert found == pytest.approx((published.E, published.alpha, published.beta), abs=2e-3)
    errors = {"E": 0.03, "A": 124.58, "B": 1293.23, "alpha": 0.02, "beta": 0.02}
    for name, error in errors.items():
        low, high = fitted.interval(lambda law, name=name: getattr(law, name))
        assert low < getattr(published, name) < high
        assert 2 * error < high - low < 6 * error
    assert fitted.undetermined == ()

    # at least as low as the minimum of SciPy's L-BFGS from the published law
    def objective(at):
        return huber(ScalingLaw(*np.exp(at[:3]), *at[3:]), n, flops / 6 / n, losses) * 1e6

    start = [*np.log(published[:3]), *published[3:]]
    found = optimize.minimize(
        objective, start, method="Nelder-Mead", options={"maxfev": 4000, "xatol": 1e-9, "fatol": 1e-9}
    )
    assert huber(fitted.law, n, flops / 6 / n, losses) * 1e6 <= found.fun * (1 + 1e-9)


def proportional(law, noise, seed):
    """Runs with D = 20 N."""
    n = np.repeat(np.logspace(4.5, 7, 8), 3)
    return n, 20 * n, law.loss(n, 20 * n) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))


@pytest.mark.parametrize("noise", [0, 1e-3, 1e-2])
@pytest.mark.parametrize("law", [SMALL, CHINCHILLA], ids=["small", "chinchilla"])
def test_proportional_sizes_and_lengths_determine_no_optimum(law, noise):
    """The law with the terms of N and D exchanged has the same losses, so no fit can tell them apart."""
    n, d, losses = proportional(law, noise, seed=1)
    exchanged = ScalingLaw(law.E, law.B * 20**-law.beta, law.A * 20**law.alpha, law.beta, law.alpha)
    assert exchanged.loss(n, d) == pytest.approx(law.loss(n, d))
    fitted = fit_with_intervals(n, d, losses, resamples=200, seed=0)
    assert {"A", "B", "alpha", "beta"} <= set(fitted.undetermined)
    assert not fitted.has_optimum
    if not noise:
        for name in ("alpha", "beta"):  # both laws are in the intervals
            low, high = fitted.interval(lambda law, name=name: getattr(law, name))
            assert low * 0.95 <= min(law.alpha, law.beta)
            assert high * 1.05 >= max(law.alpha, law.beta)


@pytest.mark.parametrize(
    ("loss", "undetermined"),
    [
        (lambda n, d: 3.0 + 0 * n, {"A", "B", "alpha", "beta"}),
        (lambda n, d: 1.1 + 900 / d**0.5, {"A", "alpha"}),
        (lambda n, d: 1.1 + 25 / n**0.3, {"B", "beta"}),
        (lambda n, d: 25 / n**0.3 + 900 / d**0.5, {"E"}),
        (SMALL.loss, set()),
    ],
    ids=["constant", "constant in N", "constant in D", "no E", "all"],
)
@pytest.mark.parametrize("noise", [0, 3e-3])
def test_coefficients_that_the_losses_do_not_depend_on_are_not_determined(loss, undetermined, noise):
    n, d, _ = runs_of(SMALL, (4.5, 7, 5), (5, 7.5, 5))
    losses = loss(n, d) * np.exp(np.random.default_rng(3).normal(0, noise, len(n)))
    fitted = fit_with_intervals(n, d, losses, resamples=200, seed=0)
    assert set(fitted.undetermined) == undetermined
    assert fitted.has_optimum == (undetermined <= {"E"})
    if fitted.has_optimum:
        assert (optimum(fitted, 1e15).loss is None) == ("E" in undetermined)


def test_as_many_runs_as_coefficients_raise():
    """They have a law without residuals, whose intervals would have no width."""
    n, d, losses = (values[[0, 6, 12, 18, 23]] for values in runs_of(SMALL, (4.5, 7, 5), (5, 7.5, 5), 3e-3))
    with pytest.raises(UserError, match="5 runs of 4 sizes and 5 lengths"):
        fit_scaling_law(n, d, losses)


def test_too_few_runs_raise():
    with pytest.raises(UserError, match="4 runs of 2 sizes and 2 lengths"):
        fit_scaling_law([1e6, 1e6, 2e6, 2e6], [1e7, 2e7, 1e7, 2e7], [2.0, 1.9, 1.8, 1.7])


def scaling_sweep(directory, widths, lengths):
    """Writes a sweep over widths and lengths with two seeds, whose losses follow a law."""
    points = [(w, t, s) for w in widths for t in lengths for s in (1, 2)]
    trials = [trial({"model.n_embd": w, "train.max_tokens": t, "seed": s}, 1.0, tokens=t) for w, t, s in points]
    write_sweep(directory, trials)
    for number, (width, tokens, seed) in enumerate(points):
        run_dir = directory / str(number)
        write_model(run_dir, n_embd=width)
        (run,) = (run for run in read_sized_runs(directory) if run.trial == number)
        noise = 1 + 1e-4 * (2 * seed - 3) * (-1) ** (number // 2)
        values = json.loads((run_dir / "trial.json").read_text())
        (run_dir / "trial.json").write_text(json.dumps(values | {"value": SMALL.loss(run.size.all, tokens) * noise}))
    return directory


def test_sweep_that_does_not_determine_the_law_has_no_optimum(tmp_path, capsys):
    scaling_sweep(tmp_path, (32, 64, 128, 256), (10**5, 10**6, 10**7))
    for path in tmp_path.glob("*/trial.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"value": 3.0}))
    report_sweep(tmp_path)
    found = ScalingAnswer.model_validate_json((tmp_path / "scaling.json").read_text())
    assert set(found.undetermined) == {"A", "B", "alpha", "beta"}
    assert found.optima == []
    shown = " ".join(capsys.readouterr().out.split())
    assert "The runs do not determine A, B, alpha, beta" in shown
    assert "no optimal model size" in found.answer
    assert found.answer in shown
    assert "C^" not in found.answer
    assert "optimal parameters" not in shown


def test_trials_whose_loss_blew_up_are_not_fitted(tmp_path):
    scaling_sweep(tmp_path, (32, 64, 128), (10**5, 10**6, 10**7))
    path = tmp_path / "4" / "trial.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blew_up": True}))
    assert [run.trial for run in read_sized_runs(tmp_path)] == [n for n in range(18) if n != 4]


@pytest.mark.slow
def test_sweep_over_sizes_and_tokens_reports_its_scaling_law(tmp_path, capsys):
    scaling_sweep(tmp_path, (32, 64, 128, 256), (10**5, 10**6, 10**7))
    runs = read_sized_runs(tmp_path)
    # 61 + 16 embeddings of 32, a norm of 64; two blocks of two norms, 12 · 32² weights and 9 · 32 biases
    assert runs[0].size == ModelSize(all=27_936, non_embedding=27_936 - 77 * 32)
    assert (len(runs), runs[0].tokens) == (24, 10**5)
    report_sweep(tmp_path)
    found = ScalingAnswer.model_validate_json((tmp_path / "scaling.json").read_text())
    assert found.law == pytest.approx(SMALL._asdict(), rel=0.02)
    assert found.optima[0].flops == 6 * max(run.size.all * run.tokens for run in runs)
    low, high = found.intervals["alpha"]
    assert low < 0.3 < high
    assert found.answer in " ".join(capsys.readouterr().out.split())


def test_sweep_too_small_for_a_fit_reports_why(tmp_path, capsys):
    scaling_sweep(tmp_path, (32, 64), (10**5, 10**6))
    with pytest.raises(UserError, match="8 runs of 2 sizes and 2 lengths"):
        fit_sweep(tmp_path)
    report_sweep(tmp_path)
    assert "8 runs of 2 sizes and 2 lengths" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "scaling.json").exists()
