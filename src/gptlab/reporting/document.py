"""Collects the report's data in one JSON-serializable document: runs, points, differences, sweeps, environments."""

import json
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gptlab.errors import UserError
from gptlab.reporting.reading import RunEntry, RunReader
from gptlab.reporting.sweeps import describe_sweep
from gptlab.tracking.run_store.runs import find_runs
from gptlab.tracking.run_store.sweeps import load_sweep

IGNORED_KEYS = ("seed", "name", "resume", "force_resume", "logger.")  # may differ within a point; prefixes end in "."
MAX_LABEL_PARTS = 4  # config keys; points that differ in more are labeled by run name
PER_START_KEYS = ("time", "command", "folder", "slurm_job")  # entries of the environment that differ between runs
LOSS = "val/loss"


class ReportDocument:
    """Collects the data of runs and sweeps. Every call of ``gather`` rereads the files that have changed.

    Args:
        where: Run directory, a directory with runs below it, or a glob of these; or several of them.
        points: Largest number of points per curve.
    """

    def __init__(self, where: str | Sequence[str], points: int) -> None:
        self.patterns, self.reader = [where] if isinstance(where, str) else list(where), RunReader(points, LOSS)

    def gather(self) -> dict[str, Any]:
        """Returns all data of the page.

        Raises:
            UserError: There are no runs, or none of them can be read.
        """
        found = find_runs(self.patterns)
        problems: list[str] = []
        parents = dict.fromkeys(run.directory.parent for run in found)
        sweeps = [sweep for parent in parents if (sweep := _sweep(parent, problems)) is not None]
        metrics = {(sweep["metric"], sweep["direction"]) for sweep in sweeps}
        self.reader.metric, direction = metrics.pop() if len(metrics) == 1 else (LOSS, "minimize")
        self.reader.which = "highest" if direction == "maximize" else "lowest"
        entries, unreadable = self.reader.read([run.directory for run in found])
        problems += unreadable
        if not entries:
            raise UserError("\n".join((f"runs={' '.join(self.patterns)}: none of the runs can be read.", *problems)))
        return {
            "where": " ".join(self.patterns),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "metric": self.reader.metric,
            "maximized": self.reader.which == "highest",
            "points_a_curve": self.reader.points,
            "problems": problems,
            "sweeps": sweeps,
            **_runs(entries),
        }


def _sweep(directory: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        sweep = load_sweep(directory)
        return None if sweep is None else describe_sweep(directory, sweep, problems)
    except UserError as error:
        problems.append(str(error))
        return None


def _runs(entries: list[RunEntry]) -> dict[str, Any]:
    """Returns the page's data on runs; config values and environments shared by several runs are stored once."""
    keys = differing([entry.settings for entry in entries])
    varied = _varied(entries, keys)
    point_of, labels = _points(entries, keys, varied)
    names = _names(entries)
    places, environments = _distinct(entries, lambda entry: {**entry.environment, **dict.fromkeys(PER_START_KEYS)})
    runs = [
        {
            "id": number,
            **entry.shown,
            "name": names[number],
            "point": point_of[number],
            "seed": entry.settings.get("seed"),
            "settings": {key: entry.settings[key] for key in keys if key in entry.settings},
            "varied": {key: _value(entry, key) for key in varied},
            "environment": places[number],
            "start": {key: entry.environment.get(key) for key in PER_START_KEYS},
        }
        for number, entry in enumerate(entries)
    ]
    common = {key: value for key, value in entries[0].settings.items() if key not in keys}
    return {
        "runs": runs,
        "points": labels,
        "keys": keys,
        "varied": varied,
        "common": common,
        "environments": environments,
        "thinned": any(entry.thinned for entry in entries),
    }


def _names(entries: list[RunEntry]) -> list[str]:
    """Returns short names for runs, without common leading directories; numbered trials are named "trial <n>"."""
    parts = [entry.run.name.split("/") for entry in entries]
    if len(entries) == 1:
        return [entries[0].run.name]
    levels = list(zip(*parts, strict=False))
    shared = next((i for i, level in enumerate(levels) if len(set(level)) > 1), len(levels) - 1)
    names = ["/".join(own[shared:]) for own in parts]
    return [
        f"trial {name}" if entry.trial and name.isdigit() else name for name, entry in zip(names, entries, strict=True)
    ]


def differing(settings: list[dict[str, Any]]) -> list[str]:
    """Returns the config keys whose values differ between runs, in the order of the configuration."""
    names = dict.fromkeys(key for one in settings for key in one)
    missing = object()
    return [key for key in names if len({repr(one.get(key, missing)) for one in settings}) > 1]


def _varied(entries: list[RunEntry], keys: list[str]) -> list[str]:
    """Returns the varied config keys: overrides if all runs are trials of sweeps, otherwise those that differ.

    ``IGNORED_KEYS`` such as the seed are excluded: runs that differ only in these belong to one point.
    """
    if all(entry.trial is not None for entry in entries):
        named = dict.fromkeys(key for entry in entries if entry.trial for key in entry.trial.overrides)
        several = [key for key in named if len({repr(_value(entry, key)) for entry in entries}) > 1]
    else:
        several = keys
    return [key for key in several if not _is_ignored(key)]


def _is_ignored(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in IGNORED_KEYS)


def _value(entry: RunEntry, key: str) -> Any:
    """Returns the value of a config key; the option of a config group is known only from a trial's overrides."""
    if key in entry.settings:
        return entry.settings[key]
    return entry.trial.overrides.get(key) if entry.trial else None


def _points(entries: list[RunEntry], keys: list[str], varied: list[str]) -> tuple[list[int], list[str]]:
    """Groups runs that are equal except for ``IGNORED_KEYS`` into points.

    Returns:
        The point of each run, and the label of each point, made from the varied config keys.
    """
    compared = [key for key in keys if not _is_ignored(key)]
    places, points = _distinct(entries, lambda entry: {key: entry.settings.get(key) for key in compared})
    first = [entries[places.index(point)] for point in range(len(points))]
    short = _short(varied)
    if not 0 < len(varied) <= MAX_LABEL_PARTS:
        labels = [entry.run.name if len(points) > 1 else str(entry.settings.get("name")) for entry in first]
    else:
        labels = [" · ".join(f"{short[key]}={_value(entry, key)}" for key in varied) for entry in first]
    often = Counter(labels)
    return places, [
        label if often[label] == 1 else f"{label} ({entry.run.name})"
        for label, entry in zip(labels, first, strict=True)
    ]


def _short(keys: Iterable[str]) -> dict[str, str]:
    """Maps config keys to the last part of their names if that is unique, otherwise to the full name."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: part if last[part := key.rpartition(".")[2]] == 1 else key for key in keys}


def _distinct(entries: list[RunEntry], key: Callable[[RunEntry], Any]) -> tuple[list[int], list[Any]]:
    """Returns, for every entry, the index of its value ``key(entry)``, and the distinct values."""
    places: dict[Hashable, int] = {}
    values: list[Any] = []
    found = []
    for entry in entries:
        value = key(entry)
        name = json.dumps(value, sort_keys=True, default=str)
        if name not in places:
            places[name] = len(values)
            values.append(value)
        found.append(places[name])
    return found, values
