"""State of a sweep on disk, and the choice of the sweep directory. Imports no torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.files import check_no_links
from gptlab.tracking.run_directory import claim_directory
from gptlab.tracking.run_store.sweeps import (
    SWEEP,
    TRIAL,
    TRIAL_END_STATES,
    Sweep,
    Trial,
    format_overrides,
    load_sweep,
    load_trials,
)

LOCK = ".lock"
PRUNE = "prune.json"  # config of pruning, in the run directory of a trial that may be pruned
# keys that do not change the result of a trial
NON_IDENTITY_KEYS = {
    "resume": True,
    "force_resume": True,
    "logger": True,
    "data": {"cache_dir", "cache_limit_gb", "max_expansion", "num_workers"},
    "tokenizer": {"vocab_dir"},
}


def config_hash(config: RunConfig) -> str:
    """Returns the hash of all config keys that can change the result of a run."""
    return hash_values(config.model_dump(mode="json", exclude=NON_IDENTITY_KEYS))  # type: ignore[arg-type]


def hash_values(values: Any) -> str:
    """Returns the hash of plain data: 16 hexadecimal digits of the SHA-256 of its JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class SweepStore:
    """Trials of a sweep, in memory and on disk; holds the lock of the sweep directory.

    Args:
        directory: Sweep directory.
        sweep: Definition of the sweep.

    Attributes:
        sweep: Definition of the sweep, with the points of an earlier process if it is resumed.
        trials: Trials by number.
        is_new: Whether the sweep is not resumed.

    Raises:
        UserError: The directory contains another sweep, or another process is running this one.
    """

    def __init__(self, directory: Path, sweep: Sweep) -> None:
        self.directory, self.sweep = directory, sweep
        check_no_links(directory)
        earlier = _load_definition(directory, "choose another hydra.sweep.dir")
        if earlier is not None and earlier.definition != sweep.definition:
            raise UserError(
                f"hydra.sweep.dir={directory} contains a different sweep. Its search space: "
                f"{format_overrides(earlier.space)}. Search space of this command: {format_overrides(sweep.space)}. "
                "If they are equal, another config key differs. Choose another hydra.sweep.dir."
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(directory / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another process is running this sweep in {directory}. To run it a second time in parallel, set "
                "hydra.sweep.dir=<directory>."
            ) from None
        if earlier is None:
            sweep.save(directory)
        self.trials = {trial.number: trial for trial in load_trials(directory)}
        if earlier is not None:
            self.sweep = sweep.model_copy(update={"points": earlier.points or self._with_known_points(sweep.points)})
        self.is_new = earlier is None

    def _with_known_points(self, points: list[dict[str, str]]) -> list[dict[str, str]]:
        """Returns the points of a grid with those of existing trials first: earlier versions did not store points."""
        known = [trial.overrides for trial in self.trials.values()]
        return known + [point for point in points if point not in known] if points else []

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def run_dir(self, trial: Trial) -> Path:
        """Returns the run directory of a trial."""
        return (self.directory / str(trial.number)).absolute()

    def write(self, trial: Trial) -> Trial:
        """Writes a trial to disk and returns it."""
        trial.save(self.directory)
        self.trials[trial.number] = trial
        return trial


def is_prunable(run_dir: Path) -> bool:
    """Whether a run is a trial that its sweep may prune."""
    return (run_dir / PRUNE).is_file()


def find_or_create_sweep_dir(name: str, sweep: Sweep) -> Path:
    """Returns the newest directory with an unfinished sweep of the same definition, or creates a directory.

    Raises:
        UserError: The sweep.json of a sweep is damaged or missing, so it is not known which sweep to resume.
    """
    outputs = Path("outputs") / name
    sweeps = {path.parent for path in outputs.glob(f"*/{SWEEP}")}
    with_trials = {path.parent.parent for path in outputs.glob(f"*/*/{TRIAL}")}
    for directory in sorted(sweeps | with_trials, reverse=True):
        earlier = _load_definition(directory, f"move {directory} elsewhere")
        if earlier is not None and earlier.definition == sweep.definition and not _is_complete(directory, earlier):
            return directory
    return claim_directory(Path("outputs") / name)


def _load_definition(directory: Path, otherwise: str) -> Sweep | None:
    """Reads sweep.json; returns None if there is no sweep.

    Args:
        directory: Sweep directory.
        otherwise: What the user can do to start a new sweep, for the message.

    Raises:
        UserError: sweep.json is damaged, or missing although there are trials.
    """
    problem = None
    try:
        sweep = load_sweep(directory)
        if sweep is None and (trial := next(directory.glob(f"*/{TRIAL}"), None)) is not None:
            problem = f"{directory / SWEEP} is missing, although there is {trial}"
    except UserError as error:
        problem = str(error).rstrip(".")
    if problem:
        raise UserError(f"{problem}. Restore it to resume the sweep. To start a new sweep, {otherwise}.")
    return sweep


def _is_complete(directory: Path, sweep: Sweep) -> bool:
    """Whether every trial has been proposed and has ended."""
    trials = load_trials(directory)
    return len(trials) >= sweep.n_trials and all(trial.state in TRIAL_END_STATES for trial in trials)
