"""Sweeps on disk: what a sweep is, and the state of its trials. Imports no torch.

<sweep directory>/sweep.json says what the sweep is; each trial has a folder named by its number, which is a run
directory with trial.json beside the rest. trial.json has one writer, the process of the sweep.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gptlab.data.shards.manifest import write_durably
from gptlab.errors import UserError
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.state import StateName

SWEEP, TRIAL = "sweep.json", "trial.json"
TrialState = StateName | Literal["waiting"]
FAILED_STATES = ("diverged", "config_error", "failed")
TRIAL_END_STATES = ("done", "pruned", *FAILED_STATES)  # of which a trial is not run again


class Trial(BaseModel):
    """One trial of a sweep.

    Attributes:
        number: Number in the sweep, and name of its run directory.
        overrides: Overrides of its point, as on a command line: {"optimizer.lr": "0.001", "seed": "1"}.
        config_hash: Hash of its configuration; a second trial with the same one is not run.
        state: See ``RunState``; a "waiting" trial has not started.
        status: Exit status; None until it has ended.
        message: Error message, one sentence.
        value: Value of the sweep's metric (lower is better), if any.
        tokens: Tokens seen.
        starts: Number of starts.
        job: Id of its job, if it runs on a cluster.
    """

    model_config = ConfigDict(extra="forbid")

    number: int
    overrides: dict[str, str]
    config_hash: str
    state: TrialState = "waiting"
    status: int | None = None
    message: str | None = None
    value: float | None = None
    tokens: int = 0
    starts: int = 0
    job: str | None = None

    def to(self, state: TrialState, **changes: Any) -> "Trial":
        """Returns a copy in another state."""
        return self.model_copy(update={"state": state, **changes})

    def save(self, sweep: Path) -> None:
        """Writes trial.json."""
        (sweep / str(self.number)).mkdir(parents=True, exist_ok=True)
        write_durably(sweep / str(self.number) / TRIAL, self.model_dump_json(indent=1) + "\n")


class Sweep(BaseModel):
    """Definition of a sweep.

    Attributes:
        question: Question that it answers, one sentence.
        space: Varied keys, as on a command line: {"optimizer.lr": "1e-3,2e-3"}.
        fixed: Other overrides of the command line.
        search: How points are chosen: "grid", "random", "tpe" or "cmaes".
        n_trials: Number of points.
        metric: Column of metrics.csv whose lowest value is compared.
        baseline: Overrides of the point that others are compared with; empty: the first point.
        definition: Hash of the definition, by which a sweep that is started again is recognized.
        wandb_group: W&B group of its runs.
    """

    model_config = ConfigDict(extra="forbid")

    question: str
    space: dict[str, str]
    fixed: list[str]
    search: str
    n_trials: int
    metric: str = "val/loss"
    baseline: dict[str, str]
    definition: str
    wandb_group: str

    def save(self, directory: Path) -> None:
        """Writes sweep.json."""
        directory.mkdir(parents=True, exist_ok=True)
        write_durably(directory / SWEEP, self.model_dump_json(indent=1) + "\n")


def format_overrides(overrides: Mapping[str, str]) -> str:
    """Formats overrides as on a command line: "optimizer.lr=1e-3 seed=1"."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def load_sweep(directory: Path) -> Sweep | None:
    """Reads sweep.json; returns None if there is none, raises UserError if it is damaged."""
    return _load(Sweep, directory / SWEEP)


def load_trials(directory: Path) -> list[Trial]:
    """Reads the trials of a sweep, by number."""
    found = (_load(Trial, path) for path in directory.glob(f"*/{TRIAL}"))
    return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)


def read_trial(run: Run) -> Trial | None:
    """Reads trial.json of a run; None if it is not a trial of a sweep."""
    return _load(Trial, run.directory / TRIAL)


def _load(kind: type[Any], path: Path) -> Any:
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
