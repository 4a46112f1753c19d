"""Answers of a sweep: a row for each point, compared with the baseline, and a one-line answer. Imports no torch."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gptlab.errors import UserError
from gptlab.sweeps.analysis.fitting import model_size
from gptlab.sweeps.analysis.phrases import (
    BASELINE,
    BestResult,
    best_line,
    format_counts,
    spread_line,
    verdict,
)
from gptlab.sweeps.analysis.points import Point, as_number, find_point, group_points, is_failed
from gptlab.sweeps.analysis.significance import Claim, compare_all, estimate
from gptlab.tracking.run_store.runs import Run, flatten
from gptlab.tracking.run_store.sweeps import Sweep, Trial, format_overrides, load_sweep, load_trials

NEXT_BEST = "\0"  # the comparison of the best two points, among those that are named by a point


class AnswerRow(BaseModel):
    """Point of a sweep, and its comparison with the baseline; lower is better.

    Attributes:
        settings: What it sets, but for the seed.
        trials: Numbers of its trials.
        values: What those came to that reached their end, by seed ("<seed>,<other>" with other replicates).
        n: How many those are.
        mean: Theirs; None where there are none.
        se: Standard error of the mean; None below two.
        comparison: How it was compared: "paired" by seed, or "welch"; None of the baseline, and where there is none.
        compared: Runs of it in the comparison.
        difference: Mean less the baseline's; of the pairs, where it is paired.
        difference_se: Standard error of the difference.
        low: Lower end of the 95 % interval of the difference, taken alone.
        high: Upper end.
        p: Of the comparison, taken alone.
        p_holm: Raised for all the comparisons of the sweep; what is below 0.05 the verdict calls a difference.
        verdict: In plain words.
        is_baseline: Whether the others are compared with it.
        failed: Trials that ended without a number.
        pruned: Trials that the sweep ended.
        unfinished: Trials that have not come to their end.
        tokens: That a run has seen.
        parameters: Of the model; None where no run says so.
        forecast: Means of what forecast.json says under "score", by dotted name.
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
    """Answers of a sweep.

    Attributes:
        question: What it wants to know.
        metric: That is compared.
        keys: What is varied, but for the seed.
        rows: The points, the best first; then those without a value.
        answer: In one line.
        comparisons: How many were made, and are corrected for.
        notes: What is to be known beside, a sentence each.
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
        UserError: ``directory`` is not a sweep's, or is damaged.
    """
    sweep = load_sweep(directory)
    if sweep is None:
        raise UserError(f"{directory} is the directory of no sweep: no sweep.json is in it (looked from {Path.cwd()}).")
    trials = load_trials(directory)
    points = group_points(trials)
    ranked = sorted((point for point in points if point.values), key=lambda point: fmean(point.values.values()))
    baseline = find_point(points, sweep.baseline)
    claims = _claims(ranked, baseline)
    rows = [
        _row(
            directory, point, claims.get(format_overrides(point.settings)), sweep.metric, is_baseline=point is baseline
        )
        for point in (*ranked, *(point for point in points if not point.values))
    ]
    return SweepAnswers(
        question=sweep.question,
        metric=sweep.metric,
        keys=list(dict.fromkeys(key for point in points for key in point.settings)),
        rows=rows,
        answer=_line(sweep, points, ranked, baseline, claims),
        comparisons=sum(claim.p is not None for claim in claims.values()),
        notes=[*_edges(ranked), *_notes(sweep, trials, baseline)],
    )


def _claims(ranked: list[Point], baseline: Point | None) -> dict[str, Claim]:
    """Compares every point with the baseline, and the best with the next if neither is the baseline; by name."""
    pairs = {}
    if baseline is not None and baseline.values:
        pairs = {format_overrides(p.settings): (p.values, baseline.values) for p in ranked if p is not baseline}
    if len(ranked) > 1 and not (pairs and any(point is baseline for point in ranked[:2])):
        pairs[NEXT_BEST] = (ranked[0].values, ranked[1].values)
    return compare_all(pairs)


def _row(directory: Path, point: Point, claim: Claim | None, metric: str, *, is_baseline: bool) -> AnswerRow:
    """Builds the row of a point; ``claim`` is its comparison with the baseline, if that has a value."""
    known: dict[str, Any] = {}
    if point.values:
        n, mean, se = estimate(list(point.values.values()))
        known = {"mean": mean, "se": se}
        compared = verdict(claim, metric) if claim is not None else f"no {BASELINE}"
        words = BASELINE if is_baseline else compared
    else:
        n, words = 0, format_counts({"failed": point.failed, "pruned": point.pruned, "unfinished": point.unfinished})
    if claim is not None:
        method, runs_of_it, _, difference, se, p, low, high = claim.comparison
        known |= {"comparison": method, "compared": runs_of_it, "difference": difference, "difference_se": se}
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


def _line(
    sweep: Sweep, points: list[Point], ranked: list[Point], baseline: Point | None, claims: dict[str, Claim]
) -> str:
    """Returns the one-line answer."""
    missing = sweep.n_trials - sum(len(point.trials) for point in points)  # their turn has not come
    unfinished = sum(point.unfinished for point in points) + max(missing, 0)
    if not ranked:
        states = {"failed": sum(p.failed for p in points), "pruned": sum(p.pruned for p in points)}
        return (
            f"no trial has come to a value: {format_counts({**states, 'unfinished': unfinished}) or 'none was begun'}"
        )
    estimates = [estimate(list(point.values.values())) for point in ranked[:1]]
    if len(points) == 1:
        return spread_line(estimates[0], sweep.metric)
    names = [format_overrides(point.settings) for point in ranked]
    compared = baseline is not None and baseline.values
    of_baseline = format_overrides(baseline.settings) if baseline is not None and compared else None
    following = claims.get(NEXT_BEST)
    if len(ranked) > 1 and ranked[0] is baseline:
        following = claims[names[1]].reversed()
    return best_line(
        BestResult(names[0], estimates[0], of_baseline, claims.get(names[0]), (*names, None)[1], following),
        sweep.metric,
        is_over=unfinished == 0,
    )


def _edges(ranked: list[Point]) -> list[str]:
    """Say of which settings the best has the smallest or the largest value that was tried, of three or more.

    Sizes of the model are left out: a larger one is better as a rule, and at another price.
    """
    notes = []
    for key in ranked[0].settings if ranked else ():
        values = {number for point in ranked if (number := as_number(point.settings.get(key, ""))) is not None}
        best = as_number(ranked[0].settings[key])
        if key.startswith("model.") or len(values) < 3 or best not in (min(values), max(values)):
            continue
        end, beyond = ("smallest", "smaller") if best == min(values) else ("largest", "larger")
        shown = ranked[0].settings[key]
        notes.append(f"The best {key} is the {end} that was tried, {shown}: a {beyond} one may be better.")
    return notes


def _notes(sweep: Sweep, trials: list[Trial], baseline: Point | None) -> list[str]:
    """Returns what went wrong, a sentence each."""
    notes = []
    if baseline is None and trials:
        notes.append(
            f"The baseline, {format_overrides(sweep.baseline)}, is no point of this sweep: nothing is compared with it."
        )
    elif baseline is not None and not baseline.values:
        notes.append(f"The baseline, {format_overrides(baseline.settings)}, has no value: nothing is compared with it.")
    for trial in filter(is_failed, trials):
        why = trial.message or f"it has no finite {sweep.metric}"
        notes.append(f"Trial {trial.number} ({format_overrides(trial.overrides)}) is left out, {trial.state}: {why}")
    return notes


def _scores(runs: list[Run]) -> dict[str, float]:
    """Returns the means of the numbers under "score" in forecast.json."""
    found: dict[str, list[float]] = {}
    for run in runs:
        score = run.forecast.get("score")
        for name, value in flatten(score if isinstance(score, dict) else {}):
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in found.items()}
