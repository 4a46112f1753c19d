"""Report of the scaling law of a sweep over model sizes and tokens: reads the runs, fits the law, prints and writes it.

Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.text import Text

from gptlab.errors import UserError
from gptlab.files import write_durably
from gptlab.model.config import embedding_count, parameter_count
from gptlab.sweeps.analysis.points import has_value
from gptlab.sweeps.analysis.scaling_fit import Optimum, ScalingFit, ScalingLaw, fit_with_intervals, optimum
from gptlab.tables import FittingTable, print_table
from gptlab.terminal import get_console
from gptlab.tracking.run_store.runs import Run
from gptlab.tracking.run_store.sweeps import load_sweep, load_trials

LENGTHS = ("train.max_tokens", "train.max_steps")


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Attributes:
        all: Number of parameters.
        non_embedding: Number of parameters without embeddings and an untied head.
    """

    all: int
    non_embedding: int


@dataclass(frozen=True)
class SizedRun:
    """Size, tokens and loss of a run, to which a scaling law is fitted.

    Attributes:
        trial: Number of the trial.
        size: Size of its model.
        tokens: Number of tokens seen.
        loss: Value of the sweep's metric, in nats per token.
    """

    trial: int
    size: ModelSize
    tokens: int
    loss: float


def model_size(run: Run) -> ModelSize | None:
    """Returns the size of a run's model, or None if the recorded configuration has no valid model."""
    try:
        config = run.model
        everything = int(run.forecast["parameters"]) if config.components else parameter_count(config)
    except (UserError, ValidationError, ValueError, KeyError):
        return None
    return ModelSize(everything, everything - embedding_count(config))


def varies_size_and_length(directory: Path) -> bool:
    """Whether a sweep varies both the model and the length of training."""
    sweep = load_sweep(directory)
    keys = [] if sweep is None else list(sweep.space)
    return any(key.partition(".")[0] == "model" for key in keys) and any(key in LENGTHS for key in keys)


def read_sized_runs(directory: Path) -> list[SizedRun]:
    """Returns size, tokens and loss of every finished trial of a sweep that has a finite value."""
    found = []
    for trial in load_trials(directory):
        size = model_size(Run(directory / str(trial.number))) if has_value(trial) else None
        if size is not None and trial.value is not None:
            found.append(SizedRun(trial.number, size, trial.tokens, trial.value))
    return found


SCALING = "scaling.json"
RESAMPLES, SEED = 200, 0  # bootstrap of the intervals
BUDGETS = (1, 10, 100)  # compute budgets of the printed optima, in multiples of the compute of the largest run


class ScalingAnswer(BaseModel):
    """Scaling law of a sweep over model sizes and tokens, with its predictions.

    N counts all parameters of a model, including embeddings. For small models, laws in non-embedding parameters are
    misleading (Pearce and Song 2024).

    Attributes:
        law: Coefficients by name, fitted to all runs.
        intervals: 95% interval of each coefficient, and of "a" and "b", the exponents of the optimal N and D in C.
        residual: Root mean square of log(measured / predicted).
        runs: Runs that the law was fitted to.
        optima: Optimal model size and tokens for the compute of the largest run, and for larger budgets.
        answer: The law in one line.
    """

    model_config = ConfigDict(extra="forbid")

    law: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    residual: float
    runs: list[SizedRun]
    optima: list[Optimum]
    answer: str


def fit_sweep(directory: Path) -> ScalingAnswer:
    """Fits a scaling law to the finished trials of a sweep.

    Raises:
        UserError: There are too few runs, sizes or lengths for a fit.
    """
    runs = read_sized_runs(directory)
    sizes, tokens = [run.size.all for run in runs], [run.tokens for run in runs]
    fitted = fit_with_intervals(sizes, tokens, [run.loss for run in runs], resamples=RESAMPLES, seed=SEED)
    largest = max(6 * n * d for n, d in zip(sizes, tokens, strict=True))
    return ScalingAnswer(
        law=fitted.law._asdict(),
        intervals={name: fitted.interval(lambda law: getattr(law, name)) for name in (*ScalingLaw._fields, "a", "b")},  # noqa: B023
        residual=fitted.residual,
        runs=runs,
        optima=[optimum(fitted, factor * largest) for factor in BUDGETS],
        answer=_line(fitted),
    )


def print_scaling(scaling: ScalingAnswer) -> None:
    """Prints the coefficients, the optima for several budgets, and the law in one line."""
    console, law = get_console(), ScalingLaw(**scaling.law)
    table = FittingTable(see_also=f"{SCALING} has all columns.")
    for heading, order in (
        *(("FLOPs", None), ("optimal parameters", None), ("optimal tokens", None)),
        *(("tokens / parameters", 1), ("loss", 2)),
    ):
        table.add_column(heading, drop_order=order)
    for best in scaling.optima:
        ratio = f"{best.tokens[0] / best.parameters[0]:.3g}"
        table.add_row(
            f"{best.flops:.2e}",
            *(_format_interval(*values) for values in (best.parameters, best.tokens)),
            ratio,
            _interval(*best.loss, ".3f"),
        )
    coefficients = FittingTable()
    for heading in ("coefficient", "estimate", "95% CI"):
        coefficients.add_column(heading)
    for name, (low, high) in scaling.intervals.items():
        coefficients.add_row(name, f"{getattr(law, name):.4g}", f"{low:.4g} to {high:.4g}")
    print_table(coefficients)
    print_table(table)
    console.print(Text(scaling.answer, "bold"))
    summary = f"Fitted to {len(scaling.runs)} runs, RMS relative error {scaling.residual:.2%}."
    intervals = f"95% bootstrap confidence intervals ({RESAMPLES} resamples)."
    page = "See 'Reading the results of a sweep' in the documentation."
    console.print(Text(f"{summary} {intervals} {page}", "dim"))


def write_scaling(scaling: ScalingAnswer, directory: Path) -> None:
    """Writes scaling.json."""
    write_durably(directory / SCALING, scaling.model_dump_json(indent=1) + "\n")


def _line(fitted: ScalingFit) -> str:
    law = fitted.law
    loss = f"loss = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3g} + {law.B:.3g} / D^{law.beta:.3g}"
    return (
        f"{loss}; optimal N grows as C^{_interval(law.a, *fitted.interval(lambda law: law.a), '.2f')}, "
        f"optimal D as C^{_interval(law.b, *fitted.interval(lambda law: law.b), '.2f')}"
    )


def _interval(value: float, low: float, high: float, form: str) -> str:
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _format_interval(value: float, low: float, high: float) -> str:
    """Formats large numbers with their interval, as in "113k (98k to 1.31M)"."""
    return f"{_format_large(value)} ({_format_large(low)} to {_format_large(high)})"


def _format_large(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
