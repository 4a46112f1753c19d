"""How large the models of runs are, and what a sweep over sizes and tokens has measured. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from gptlab.errors import UserError
from gptlab.model.config import GPTConfig, embedding_count, parameter_count
from gptlab.sweeps.analysis.points import has_value
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.sweeps import load_sweep, load_trials

LENGTHS = ("train.max_tokens", "train.max_steps")


@dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        all: Its parameters.
        non_embedding: Those that are in no embedding and no untied head.
    """

    all: int
    non_embedding: int


@dataclass(frozen=True)
class SizedRun:
    """A run, as a scaling law sees it.

    Attributes:
        trial: Its number.
        size: Of its model.
        tokens: That it has seen.
        loss: That it came to, nats per token.
    """

    trial: int
    size: ModelSize
    tokens: int
    loss: float


def model_size(run: Run) -> ModelSize | None:
    """Count the parameters of a run's model; None where its configuration does not say."""
    try:
        config = GPTConfig.model_validate(run.config.get("model"))
        everything = parameter_count(config)
    except (UserError, ValidationError, ValueError):
        return None
    return ModelSize(everything, everything - embedding_count(config))


def varies_size_and_length(directory: Path) -> bool:
    """Whether a sweep varies both the model and how long it is trained."""
    sweep = load_sweep(directory)
    keys = [] if sweep is None else list(sweep.space)
    return any(key.partition(".")[0] == "model" for key in keys) and any(key in LENGTHS for key in keys)


def read_sized_runs(directory: Path) -> list[SizedRun]:
    """Read size, tokens and loss of every trial of a sweep that came to its end with a number."""
    found = []
    for trial in load_trials(directory):
        size = model_size(Run(directory / str(trial.number))) if has_value(trial) else None
        if size is not None and trial.value is not None:
            found.append(SizedRun(trial.number, size, trial.tokens, trial.value))
    return found
