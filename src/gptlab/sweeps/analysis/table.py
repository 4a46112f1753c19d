"""Results of a sweep: a row per point, compared with the baseline, and a one-line answer. Imports no torch."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gptlab.errors import UserError
from gptlab.sweeps.analysis.phrases import (
    BASELINE,
    BestResult,
    Metric,
    best_line,
    format_counts,
    spread_line,
    verdict,
)
from gptlab.sweeps.analysis.points import Point, as_number, find_point, group_points, is_failed
from gptlab.sweeps.analysis.scaling_report import model_size
from gptlab.sweeps.analysis.significance import Claim, compare_all, estimate
from gptlab.tracking.run_store.runs import FORECAST, Run, flatten
from gptlab.tracking.run_store.sweeps import Sweep, Trial, format_overrides, load_sweep, load_trials

NEXT_BEST = "\0"  # key of the comparison of the best two points; the other keys are names of points


class AnswerRow(BaseModel):
    """Point of a sweep and its comparison with the baseline.

    Attributes:
        settings: Overrides of the point, without the seed.
        trials: Numbers of its trials.
        values: Values of the finished trials, by replicate (the seed).
        n: Number of values.
        mean: Mean of the values, or None without values.
        se: Standard error of the mean, or None with fewer than two values.
        comparison: Test used: "paired" by seed, or "welch". None for the baseline and without a baseline.
        compared: Number of its runs in the comparison.
        difference: Mean minus the mean of the baseline; over the pairs, if paired.
        difference_se: Standard error of the difference.
        low: Lower end of the 95% confidence interval of the difference, not corrected for multiple comparisons.
        high: Upper end of that interval.
        p: p-value of the comparison, not corrected.
        p_holm: p-value corrected for all comparisons of the sweep; the difference is significant if it is below 0.05.
        verdict: Result in words.
        is_baseline: Whether the point is the baseline.
        failed: Number of trials that failed or have no finite value.
        pruned: Number of pruned trials.
        unfinished: Number of trials that have not ended.
        tokens: Number of tokens that a run has seen.
        parameters: Number of parameters of the model, or None if no run recorded a valid model config.
        forecast: Means of the numbers under "score" in the forecast.json of the runs, by dotted name.
    """

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, str]
    trials: list[int]
    values: dict[str, float]
    n: int
    mean: float | None = None
    se: float | None = None
    comparison: Literal["paired", "welch"] | None = None
    compared: int | None = None
    difference: float | None = None
    difference_se: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    verdict: str
    is_baseline: bool
    failed: int
    pruned: int
    unfinished: int
    tokens: int
    parameters: int | None
    forecast: dict[str, float]


class SweepAnswers(BaseModel):
    """Results of a sweep.

    Attributes:
        question: Question of the sweep.
        metric: Metric that is compared.
        keys: Varied keys, without the seed.
        rows: Points with a value, best first, then points without a value.
        answer: One-line answer.
        comparisons: Number of comparisons, for which the p-values are corrected.
        notes: Warnings, one sentence each.
    """

    model_config = ConfigDict(extra="forbid")

    question: str
    metric: str
    keys: list[str]
    rows: list[AnswerRow]
    answer: str
    comparisons: int
    notes: list[str]


def analyze_sweep(directory: Path) -> SweepAnswers:
    """Compares the points of a sweep, which may still be running.

    Raises:
        UserError: ``directory`` is not the directory of a sweep, or is damaged.
    """
    sweep = load_sweep(directory)
    if sweep is None:
        raise UserError(
            f"{directory} is not the directory of a sweep: it contains no sweep.json (current directory: {Path.cwd()})."
        )
    trials = load_trials(directory)
    points = group_points(trials)
    metric = Metric(sweep.metric, is_maximized=sweep.direction == "maximize")
    ranked = sorted(
        (point for point in points if point.values),
        key=lambda point: fmean(point.values.values()) * (-1 if metric.is_maximized else 1),
    )
    baseline = find_point(points, sweep.baseline)
    claims = _claims(ranked, baseline)
    rows = [
        _row(directory, point, claims.get(format_overrides(point.settings)), metric, is_baseline=point is baseline)
        for point in (*ranked, *(point for point in points if not point.values))
    ]
    return SweepAnswers(
        question=sweep.question,
        metric=sweep.metric,
        keys=list(dict.fromkeys(key for point in points for key in point.settings)),
        rows=rows,
        answer=_answer(sweep.n_trials, metric, points, ranked, baseline, claims),
        comparisons=sum(claim.p is not None for claim in claims.values()),
        notes=[*_edges(ranked), *_notes(sweep, trials, baseline), *_damaged(directory, trials)],
    )


def _claims(ranked: list[Point], baseline: Point | None) -> dict[str, Claim]:
    """Compares every point with the baseline, and the best two if neither is the baseline; returns claims by name."""
    pairs = {}
    if baseline is not None and baseline.values:
        pairs = {format_overrides(p.settings): (p.values, baseline.values) for p in ranked if p is not baseline}
    if len(ranked) > 1 and not (pairs and any(point is baseline for point in ranked[:2])):
        pairs[NEXT_BEST] = (ranked[0].values, ranked[1].values)
    return compare_all(pairs)


def _row(directory: Path, point: Point, claim: Claim | None, metric: Metric, *, is_baseline: bool) -> AnswerRow:
    """Builds the row of a point; ``claim`` is its comparison with the baseline, or None if there is none."""
    known: dict[str, Any] = {}
    if point.values:
        n, mean, se = estimate(list(point.values.values()))
        known = {"mean": mean, "se": se}
        compared = verdict(claim, metric) if claim is not None else f"no {BASELINE}"
        words = BASELINE if is_baseline else compared
    else:
        n, words = 0, format_counts({"failed": point.failed, "pruned": point.pruned, "unfinished": point.unfinished})
    if claim is not None:
        method, compared_runs, _, difference, se, p, low, high = claim.comparison
        known |= {"comparison": method, "compared": compared_runs, "difference": difference, "difference_se": se}
        known |= {"p": p, "low": low, "high": high, "p_holm": claim.p}
    runs = [Run(directory / str(trial.number)) for trial in point.trials]
    return AnswerRow(
        settings=point.settings,
        trials=[trial.number for trial in point.trials],
        values={",".join(replicate): value for replicate, value in point.values.items()},
        n=n,
        verdict=words,
        is_baseline=is_baseline,
        failed=point.failed,
        pruned=point.pruned,
        unfinished=point.unfinished,
        tokens=point.tokens,
        parameters=next((size.all for size in map(model_size, runs) if size is not None), None),
        forecast=_scores(runs),
        **known,
    )


def _answer(
    n_trials: int,
    metric: Metric,
    points: list[Point],
    ranked: list[Point],
    baseline: Point | None,
    claims: dict[str, Claim],
) -> str:
    """Returns the one-line answer."""
    missing = n_trials - sum(len(point.trials) for point in points)  # not proposed yet
    unfinished = sum(point.unfinished for point in points) + max(missing, 0)
    if not ranked:
        states = {"failed": sum(p.failed for p in points), "pruned": sum(p.pruned for p in points)}
        return f"no trial has a value: {format_counts({**states, 'unfinished': unfinished}) or 'none was started'}"
    estimates = [estimate(list(point.values.values())) for point in ranked[:1]]
    if len(points) == 1:
        return spread_line(estimates[0], metric)
    names = [format_overrides(point.settings) for point in ranked]
    is_comparable = baseline is not None and baseline.values
    baseline_name = format_overrides(baseline.settings) if baseline is not None and is_comparable else None
    following = claims.get(NEXT_BEST)
    if len(ranked) > 1 and ranked[0] is baseline:
        following = claims[names[1]].reversed()
    return best_line(
        BestResult(names[0], estimates[0], baseline_name, claims.get(names[0]), (*names, None)[1], following),
        metric,
        is_over=unfinished == 0,
    )


def _edges(ranked: list[Point]) -> list[str]:
    """Returns a note for each key whose best value is the smallest or largest of at least three values that were tried.

    Omits model sizes: a larger model is usually better, but costs more.
    """
    notes = []
    for key in ranked[0].settings if ranked else ():
        values = {number for point in ranked if (number := as_number(point.settings.get(key, ""))) is not None}
        best = as_number(ranked[0].settings[key])
        if key.startswith("model.") or len(values) < 3 or best not in (min(values), max(values)):
            continue
        end, beyond = ("smallest", "smaller") if best == min(values) else ("largest", "larger")
        shown = ranked[0].settings[key]
        notes.append(f"The best {key} is the {end} value that was tried ({shown}). A {beyond} value may be better.")
    return notes


def _notes(sweep: Sweep, trials: list[Trial], baseline: Point | None) -> list[str]:
    """Returns a note for a missing baseline and for each failed trial."""
    notes = []
    if baseline is None and trials:
        notes.append(
            f"The baseline {format_overrides(sweep.baseline)} is not a point of this sweep. "
            "No point is compared with it."
        )
    elif baseline is not None and not baseline.values:
        notes.append(f"The baseline {format_overrides(baseline.settings)} has no value. No point is compared with it.")
    for trial in filter(is_failed, trials):
        reason = trial.message or f"{sweep.metric} has no finite value"
        notes.append(
            f"Trial {trial.number} ({format_overrides(trial.overrides)}) is excluded, state {trial.state}: {reason}"
        )
    return notes


def _damaged(directory: Path, trials: list[Trial]) -> list[str]:
    """Returns a note for each forecast.json that cannot be read, so that the table lacks its values."""
    runs = (Run(directory / str(trial.number)) for trial in trials)
    return [f"{problem}." for run in runs for problem in run.damaged(FORECAST)]


def _scores(runs: list[Run]) -> dict[str, float]:
    """Returns the means over the runs of the numbers under "score" in forecast.json, by dotted name."""
    found: dict[str, list[float]] = {}
    for run in runs:
        score = run.forecast.get("score")
        for name, value in flatten(score if isinstance(score, dict) else {}):
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in found.items()}
