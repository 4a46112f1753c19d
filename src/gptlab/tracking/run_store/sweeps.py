"""Sweep directories: the definition of a sweep and the state of its trials. Imports no torch.

<sweep directory>/sweep.json defines the sweep. Each trial has a run directory, named by its number, that also contains
trial.json. Only the process of the sweep writes trial.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gptlab.errors import UserError, failure_reason
from gptlab.files import read_regular, write_durably
from gptlab.parsing import parse_json
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.state import StateName, load_state

SWEEP, TRIAL = "sweep.json", "trial.json"
TrialState = StateName | Literal["waiting"]
Direction = Literal["minimize", "maximize"]
FAILED_STATES = ("diverged", "config_error", "failed")
TRIAL_END_STATES = ("done", "pruned", *FAILED_STATES)  # a trial in one of these is not run again


# Metrics of a run by which points can be compared; of names with "/", the last part determines the direction.
DIRECTIONS: dict[str, Direction] = {
    **dict.fromkeys(("val/loss", "train/loss", "val/bits_per_byte"), "minimize"),
    **dict.fromkeys(("peak_memory_gb", "data_wait", "bad_steps", "loss_spikes"), "minimize"),
    **dict.fromkeys(("energy_kwh", "emissions_kg"), "minimize"),
    **dict.fromkeys(("hellaswag/acc", "hellaswag/acc_norm", "tokens_per_second", "mfu"), "maximize"),
}


def known_direction(metric: str) -> Direction | None:
    """Returns whether lower or higher values of a metric are better; None if that is not known from its name."""
    by_last_part = {name.rpartition("/")[2]: direction for name, direction in DIRECTIONS.items() if "/" in name}
    return DIRECTIONS.get(metric) or (by_last_part.get(metric.rpartition("/")[2]) if "/" in metric else None)


class Trial(BaseModel):
    """One trial of a sweep.

    Attributes:
        number: Number in the sweep, and name of the run directory.
        overrides: Overrides of the point, as on a command line: {"optimizer.lr": "0.001", "seed": "1"}.
        config_hash: Hash of the configuration; a second trial with the same hash is not run.
        state: State of the run (see ``RunState``), or "waiting" before its first start.
        status: Exit code; None until the trial has ended.
        message: Error message, one sentence.
        value: Best value of the sweep's metric, if any.
        blew_up: Whether the trial is done, but its loss blew up (see ``describe_blow_up``): its value is not that of
            the model at the end.
        tokens: Tokens seen.
        starts: Number of starts.
        job: ID of the job on a cluster, if any.
    """

    model_config = ConfigDict(extra="forbid")

    number: int
    overrides: dict[str, str]
    config_hash: str
    state: TrialState = "waiting"
    status: int | None = None
    message: str | None = None
    value: float | None = None
    blew_up: bool = False
    tokens: int = 0
    starts: int = 0
    job: str | None = None

    def to(self, state: TrialState, **changes: Any) -> "Trial":
        """Returns a copy in another state, with other attributes changed as well if given."""
        return self.model_copy(update={"state": state, **changes})

    def save(self, sweep: Path) -> None:
        """Writes trial.json."""
        (sweep / str(self.number)).mkdir(parents=True, exist_ok=True)
        write_durably(sweep / str(self.number) / TRIAL, self.model_dump_json(indent=1) + "\n")


class Sweep(BaseModel):
    """Definition of a sweep.

    Attributes:
        question: Question that the sweep answers, one sentence.
        space: Search space, as on a command line: {"optimizer.lr": "1e-3,2e-3"}.
        fixed: Overrides of the command line that are the same for all trials.
        search: How points are chosen: "grid", "random", "tpe" or "cmaes".
        n_trials: Number of points.
        search_seed: Random seed of the search.
        metric: Column of metrics.csv; the best value of each trial is compared.
        direction: Whether lower ("minimize") or higher ("maximize") values are better.
        prune: Settings of pruning, or None.
        baseline: Overrides of the point that the others are compared with; empty for the first point.
        wandb_group: W&B group of its trials.
        points: Points of a grid, in the order of their trials. They are not computed again when the sweep is resumed,
            because an override can be random (``seed=shuffle(1,2,3)``). Empty for other searches.
    """

    model_config = ConfigDict(extra="ignore")  # earlier versions stored a hash

    question: str
    space: dict[str, str]
    fixed: list[str]
    search: str
    n_trials: int
    search_seed: int = 0
    metric: str = "val/loss"
    direction: Direction = "minimize"
    prune: dict[str, Any] | None = None
    baseline: dict[str, str]
    wandb_group: str
    points: list[dict[str, str]] = []

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Adds the direction that the metric of an earlier version's sweep is known to have."""
        if isinstance(values, dict) and "direction" not in values and (metric := values.get("metric")):
            return {**values, "direction": known_direction(str(metric)) or "minimize"}
        return values

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
    """Reads the trials of a sweep, sorted by number; raises UserError if one is damaged."""
    found = (_load(Trial, path) for path in directory.glob(f"*/{TRIAL}"))
    return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)


def read_trial(run: Run) -> Trial | None:
    """Reads trial.json of a run; returns None if the run is not a trial of a sweep."""
    return _load(Trial, run.directory / TRIAL)


def ended_status(run_dir: Path) -> int | None:
    """Returns the exit code that the run of a trial recorded when it ended, so that it is not run again; else None."""
    state = load_state(run_dir)
    return state.status if state is not None and state.state in TRIAL_END_STATES else None


def reopen(run_dir: Path) -> None:
    """Marks the run of a trial that is run again as one that has not ended: its record is of an earlier start."""
    state = load_state(run_dir)
    if state is not None and state.state in TRIAL_END_STATES:
        state.model_copy(update={"state": "stopped", "status": None, "message": None}).save(run_dir)


def _load(kind: type[Any], path: Path) -> Any:
    try:
        return kind.model_validate(parse_json(read_regular(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{path} cannot be read: {failure_reason(error)}") from None
