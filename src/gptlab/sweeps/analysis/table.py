"""Results of a sweep: a row per point, compared with the baseline, and a one-line answer. Imports no torch."""

import math
from collections.abc import Sequence
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
    join_some,
    spread_line,
    verdict,
)
from gptlab.sweeps.analysis.points import MAX_LOST, Point, as_number, find_point, group_points, is_failed
from gptlab.sweeps.analysis.ranking import Ranking, is_inferior, rank
from gptlab.sweeps.analysis.scaling_report import model_size
from gptlab.sweeps.analysis.significance import Claim, compare, estimate
from gptlab.tracking.run_store.runs import FORECAST, Run, flatten
from gptlab.tracking.run_store.sweeps import Sweep, Trial, format_overrides, load_sweep, load_trials

ADJUSTED = "Some points lack seeds: the points are in the order of means that are adjusted for the seeds."


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
        rows: Ranked points, best first, then points that lost too many trials to be ranked, then points without value.
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
    is_search = sweep.search != "grid" and not sweep.baseline  # its first point is not special
    baseline = None if is_search or len(points) == 1 else find_point(points, sweep.baseline)
    ranking = rank(points, baseline, metric)
    rows = [
        _row(directory, point, ranking, metric, is_baseline=point is baseline)
        for point in (*ranking.ranked, *ranking.left_out, *(point for point in points if not point.values))
    ]
    return SweepAnswers(
        question=sweep.question,
        metric=sweep.metric,
        keys=list(dict.fromkeys(key for point in points for key in point.settings)),
        rows=rows,
        answer=answer_line(sweep.n_trials, metric, points, ranking),
        comparisons=sum(claim.p is not None for claim in ranking.claims.values()),
        notes=[
            *([ADJUSTED] if ranking.is_adjusted else []),
            *_edges(ranking, points),
            *_notes(sweep, trials, points, baseline),
            *_damaged(directory, trials),
        ],
    )


def _row(directory: Path, point: Point, ranking: Ranking, metric: Metric, *, is_baseline: bool) -> AnswerRow:
    """Builds the row of a point."""
    known: dict[str, Any] = {}
    claim = ranking.claims.get(format_overrides(point.settings))
    if point.values:
        n, mean, se = estimate(list(point.values.values()))
        known = {"mean": mean, "se": se}
    else:
        n = 0
    if claim is not None:
        method, compared_runs, _, difference, se, p, low, high, _ = claim.comparison
        known |= {"comparison": method, "compared": compared_runs, "difference": difference, "difference_se": se}
        known |= {"p": p, "low": low, "high": high, "p_holm": claim.p}
    runs = [Run(directory / str(trial.number)) for trial in point.trials]
    return AnswerRow(
        settings=point.settings,
        trials=[trial.number for trial in point.trials],
        values={",".join(replicate): value for replicate, value in point.values.items()},
        n=n,
        verdict=point_verdict(point, ranking, metric, is_baseline=is_baseline),
        is_baseline=is_baseline,
        failed=point.failed,
        pruned=point.pruned,
        unfinished=point.unfinished,
        tokens=point.tokens,
        parameters=next((size.all for size in map(model_size, runs) if size is not None), None),
        forecast=_scores(runs),
        **known,
    )


def point_verdict(point: Point, ranking: Ranking, metric: Metric, *, is_baseline: bool) -> str:
    """Returns the result of a point in words."""
    if not point.values:
        return format_counts({"failed": point.failed, "pruned": point.pruned, "unfinished": point.unfinished})
    claim = ranking.claims.get(point.name)
    if claim is None or ranking.baseline is None:
        return BASELINE if is_baseline else ""
    winner = ranking.baseline if is_inferior(claim, metric) else point
    return verdict(claim, metric, winner.lost if winner.is_biased else "")


def answer_line(n_trials: int, metric: Metric, points: list[Point], ranking: Ranking) -> str:
    """Returns the one-line answer."""
    missing = n_trials - sum(len(point.trials) for point in points)  # not proposed yet
    unfinished = sum(point.unfinished for point in points) + max(missing, 0)
    ranked = ranking.ranked
    left_out = [f"{point.name} ({_lost(point, ranked, metric)})" for point in ranking.left_out]
    if not ranked and not left_out:
        states = {"failed": sum(p.failed for p in points), "pruned": sum(p.pruned for p in points)}
        return f"no trial has a value: {format_counts({**states, 'unfinished': unfinished}) or 'none was started'}"
    if len(points) == 1:
        lost = f" ({points[0].lost})" if points[0].lost else ""
        return spread_line(estimate(list(points[0].values.values())), metric) + lost
    if not ranked:
        return f"no best: more than {MAX_LOST:.0%} of the trials of every point are lost: {join_some(left_out)}"
    if ranking.no_best is not None:
        return f"no best: {ranking.no_best}"
    best = estimate(list(ranked[0].values.values()))
    return best_line(
        BestResult(
            name=ranked[0].name,
            estimate=best,
            lost=ranked[0].lost,
            comparisons=ranking.of_best,
            is_baseline=ranked[0] is ranking.baseline,
            is_only=len(ranked) + len(left_out) == 1,
            left_out=left_out,
        ),
        metric,
        is_over=unfinished == 0,
    )


def _lost(point: Point, ranked: Sequence[Point], metric: Metric) -> str:
    """Returns the failed and pruned trials of a point that is not ranked, and whether the others are the best ones."""
    is_better = ranked and not is_inferior(Claim(compare(point.values, ranked[0].values), None), metric)
    return f"{point.lost}; the others are better" if is_better else point.lost


def _edges(ranking: Ranking, points: list[Point]) -> list[str]:
    """Returns a note for each key whose best value is the smallest or largest of at least three values that were tried.

    Omits model sizes: a larger model is usually better, but costs more.
    """
    notes = []
    settings = ranking.ranked[0].settings if ranking.ranked and ranking.no_best is None else {}
    for key, shown in settings.items():
        values = {number for point in points if (number := as_number(point.settings.get(key, ""))) is not None}
        best = as_number(shown)
        if key.startswith("model.") or len(values) < 3 or best not in (min(values), max(values)):
            continue
        end, beyond = ("smallest", "smaller") if best == min(values) else ("largest", "larger")
        notes.append(f"The best {key} is the {end} value that was tried ({shown}). A {beyond} value may be better.")
    return notes


def _notes(sweep: Sweep, trials: list[Trial], points: list[Point], baseline: Point | None) -> list[str]:
    """Returns a note for a missing baseline and for each failed trial."""
    notes = []
    if baseline is None and sweep.baseline and find_point(points, sweep.baseline) is None and trials:
        notes.append(
            f"The baseline {format_overrides(sweep.baseline)} is not a point of this sweep. "
            "No point is compared with it."
        )
    elif baseline is not None and not baseline.values:
        notes.append(f"The baseline {baseline.name} has no value. No point is compared with it.")
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
