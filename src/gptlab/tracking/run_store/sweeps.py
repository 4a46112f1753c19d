"""Sweeps as they lie in outputs/: what was asked, and what each trial came to. Imports no torch.

<sweep directory>/sweep.json says what the sweep is; each trial has a folder named by its number, which is a run
directory with trial.json beside the rest. trial.json has one writer, the process of the sweep.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gptlab.data.shards.manifest import write_durably
from gptlab.errors import UserError
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.state import StateName

SWEEP, TRIAL = "sweep.json", "trial.json"
TrialState = StateName | Literal["waiting"]
TRIAL_END_STATES = ("done", "pruned", "diverged", "config_error", "failed")  # of which a trial is not run again


class Trial(BaseModel):
    """One point of a sweep.

    Attributes:
        number: Its place in the sweep, and the name of its folder.
        overrides: What it changes, as they are written on a command line: {"optimizer.lr": "0.001", "seed": "1"}.
        config_hash: Of its whole configuration; a trial that has ended is not run again.
        state: See RunState; "waiting" has not begun.
        status: Exit status; None until it has ended.
        message: What went wrong, in a sentence.
        value: The sweep's metric (lower is better); None where there is none.
        tokens: That it has seen.
        starts: How often it was started.
        job: Of a cluster, where it runs as one.
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
        """Return it in another state."""
        return self.model_copy(update={"state": state, **changes})

    def save(self, sweep: Path) -> None:
        """Write trial.json."""
        (sweep / str(self.number)).mkdir(parents=True, exist_ok=True)
        write_durably(sweep / str(self.number) / TRIAL, self.model_dump_json(indent=1) + "\n")


class Sweep(BaseModel):
    """What a sweep is.

    Attributes:
        question: What it wants to know, in a sentence.
        space: What is varied, as it is written: {"optimizer.lr": "1e-3,2e-3"}.
        fixed: The other overrides of the command line.
        search: "grid", or how points are chosen: "random", "tpe", "cmaes".
        n_trials: How many points there are to be.
        metric: Of metrics.csv, whose lowest value counts.
        baseline: The overrides that the others are compared with; empty: the first point.
        definition: Hash of what makes the sweep this one; a sweep that is started again has the same.
        wandb_group: Under which its runs are at W&B.
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
        """Write sweep.json."""
        directory.mkdir(parents=True, exist_ok=True)
        write_durably(directory / SWEEP, self.model_dump_json(indent=1) + "\n")


def load_sweep(directory: Path) -> Sweep | None:
    """Read what a sweep is; None where the directory is none of a sweep, UserError where it is damaged."""
    return _load(Sweep, directory / SWEEP)


def load_trials(directory: Path) -> list[Trial]:
    """Read the trials of a sweep, in their order."""
    found = (_load(Trial, path) for path in directory.glob(f"*/{TRIAL}"))
    return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)


def read_trial(run: Run) -> Trial | None:
    """Read which trial of a sweep a run is; None where it is a run of its own."""
    return _load(Trial, run.directory / TRIAL)


def _load(kind: type[Any], path: Path) -> Any:
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
