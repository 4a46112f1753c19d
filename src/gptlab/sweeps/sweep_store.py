"""State of a sweep on disk, and the choice of the sweep directory. Imports no torch."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptlab.config.locations import outputs_folder
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

IsCurrent = Callable[[Trial], bool]
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
        is_current: Whether a trial of an earlier process has the configuration that its point has now.

    Attributes:
        sweep: Definition of the sweep; if it is resumed, with the points of the earlier process first.
        trials: Trials by number.
        is_new: Whether the sweep is not resumed.

    Raises:
        UserError: The directory contains another sweep, or another process is running this one.
    """

    def __init__(self, directory: Path, sweep: Sweep, is_current: IsCurrent) -> None:
        self.directory, self.sweep = directory, sweep
        check_no_links(directory)
        earlier = _load_definition(directory, "choose another hydra.sweep.dir")
        if earlier is not None and (difference := _difference(directory, earlier, sweep, is_current)):
            raise UserError(
                f"hydra.sweep.dir={directory} contains a different sweep: {difference}. Choose another hydra.sweep.dir."
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
        self.trials = {trial.number: trial for trial in load_trials(directory)}
        if earlier is not None:
            # earlier versions did not store the points
            known = earlier.points or [trial.overrides for trial in self.trials.values()]
            added = [point for point in sweep.points if point not in known]
            points = [*known, *added] if sweep.search == "grid" else []
            self.sweep = sweep.model_copy(update={"points": points, "wandb_group": earlier.wandb_group})
        if self.sweep != earlier:
            self.sweep.save(directory)
        self.is_new = earlier is None

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


def find_or_create_sweep_dir(name: str, sweep: Sweep, is_current: IsCurrent) -> Path:
    """Returns the directory of the newest sweep that this one resumes or extends, or creates a directory.

    A sweep is resumed if it has the same definition and is unfinished. It is extended if this one has more points.

    Raises:
        UserError: A file of a sweep is damaged or missing, so it is not known which sweep to resume.
    """
    outputs = outputs_folder() / name
    sweeps = {path.parent for path in outputs.glob(f"*/{SWEEP}")}
    with_trials = {path.parent.parent for path in outputs.glob(f"*/*/{TRIAL}")}
    for directory in sorted(sweeps | with_trials, reverse=True):
        earlier = _load_definition(directory, f"move {directory} elsewhere")
        if earlier is None or _difference(directory, earlier, sweep, is_current):
            continue
        trials = load_trials(directory)
        if len(trials) < sweep.n_trials or any(trial.state not in TRIAL_END_STATES for trial in trials):
            return directory
        if earlier.n_trials == sweep.n_trials:
            break  # it is complete, and an older sweep is not extended in its place
    return claim_directory(outputs_folder() / name)


def _difference(directory: Path, earlier: Sweep, sweep: Sweep, is_current: IsCurrent) -> str | None:
    """Returns how an earlier sweep differs from one that would resume or extend it; None if it does not."""
    for name in ("search", "metric", "direction", "prune"):
        if (was := getattr(earlier, name)) != getattr(sweep, name):
            return f"its hydra.sweeper.{name} is {was}"
    if earlier.search != "grid" and earlier.search_seed != sweep.search_seed:
        return f"its hydra.sweeper.seed is {earlier.search_seed}"
    if sorted(earlier.fixed) != sorted(sweep.fixed):
        return f"its overrides are {' '.join(earlier.fixed) or 'none'}"
    if sweep.search == "grid" and earlier.points:
        points = {frozenset(point.items()) for point in sweep.points}
        is_other = not all(frozenset(point.items()) in points for point in earlier.points)
    else:  # earlier versions did not store the points
        is_other = earlier.space != sweep.space
    if is_other:
        return f"its search space is {format_overrides(earlier.space) or 'empty'}"
    changed = [trial for trial in load_trials(directory) if not is_current(trial)]
    return f"the configuration of its trial {changed[0].number} was another one" if changed else None


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
