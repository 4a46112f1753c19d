"""Points of a sweep: trials that differ only in the seed, grouped. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gptlab.sweeps.analysis.significance import Replicate
from gptlab.tracking.run_store.sweeps import FAILED_STATES, Trial, format_overrides

SEED = "seed"
MAX_LOST = 0.1  # largest share of failed and pruned trials of a point that is named best or better
NAMES: Mapping[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}


class Point(NamedTuple):
    """Point of a sweep: one combination of hyperparameters, trained with one or more seeds.

    Attributes:
        settings: Overrides, without the seed.
        trials: Trials of the point, in the order of their numbers.
        values: Values of the trials that finished with a finite value, by replicate.
    """

    settings: dict[str, str]
    trials: list[Trial]
    values: dict[Replicate, float]

    @property
    def name(self) -> str:
        """Its overrides as on the command line, without the seed."""
        return format_overrides(self.settings)

    @property
    def failed(self) -> int:
        """Number of trials that failed or ended without a finite value."""
        return sum(is_failed(trial) for trial in self.trials)

    @property
    def pruned(self) -> int:
        """Number of pruned trials; their values are not comparable with those of finished trials."""
        return sum(trial.state == "pruned" for trial in self.trials)

    @property
    def is_biased(self) -> bool:
        """Whether more than ``MAX_LOST`` of the trials failed or were pruned.

        Seeds with high losses are more likely to fail and to be pruned, so the mean of the others is too low.
        """
        return self.failed + self.pruned > MAX_LOST * len(self.trials)

    @property
    def lost(self) -> str:
        """Number of failed and pruned trials, as text: "2 of 5 trials failed, 1 of 5 pruned"."""
        counts = {"failed": self.failed, "pruned": self.pruned}
        found = [f"{count} of {len(self.trials)} trials {name}" for name, count in counts.items() if count]
        return ", ".join(found)

    @property
    def unfinished(self) -> int:
        """Number of trials that have not ended."""
        return sum(trial.state not in ("done", "pruned", *FAILED_STATES) for trial in self.trials)

    @property
    def tokens(self) -> int:
        """Largest number of tokens that a trial of the point has seen."""
        done = [trial.tokens for trial in self.trials if has_value(trial)]
        return max(done or [trial.tokens for trial in self.trials])


def has_value(trial: Trial) -> bool:
    """Whether a trial finished with a finite value, and its loss did not blow up after it."""
    is_done = trial.state == "done" and not trial.blew_up
    return is_done and trial.value is not None and math.isfinite(trial.value)


def as_number(setting: str) -> float | None:
    """Parses the value of an override as a finite number; returns None if it is not one."""
    number = _parsed(setting)
    return number if isinstance(number, float) and math.isfinite(number) else None


def is_failed(trial: Trial) -> bool:
    """Whether a trial failed, blew up or finished without a finite value; pruned trials do not count."""
    return trial.state in FAILED_STATES or (trial.state == "done" and not has_value(trial))


def group_points(trials: Sequence[Trial]) -> list[Point]:
    """Groups trials that differ only in the seed, in the order of the trials."""
    points: dict[tuple[tuple[str, str], ...], Point] = {}
    for trial in trials:
        overrides = {key.lstrip("+"): value for key, value in trial.overrides.items()}
        settings = {key: value for key, value in overrides.items() if key != SEED}
        point = points.setdefault(tuple(sorted(settings.items())), Point(settings, [], {}))
        point.trials.append(trial)
        if has_value(trial) and trial.value is not None:
            replicate = (overrides[SEED],) if SEED in overrides else ()
            point.values.setdefault(replicate, trial.value)  # equal trials count once
    return list(points.values())


def find_point(points: Sequence[Point], settings: Mapping[str, str]) -> Point | None:
    """Returns the first point with these overrides, or None."""
    wanted = {key: _parsed(value) for key, value in settings.items() if key != SEED}
    for point in points:
        if all(key in point.settings and _parsed(point.settings[key]) == value for key, value in wanted.items()):
            return point
    return None


def _parsed(value: str) -> str | float | bool | None:
    """Parses the value of an override, so that 1e-3 equals 0.001."""
    try:
        return float(value)
    except ValueError:
        return NAMES.get(value.lower(), value)
