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
from gptlab.sweeps.analysis.scaling_fit import (
    MAX_SPAN,
    Optimum,
    ScalingFit,
    ScalingLaw,
    fit_with_intervals,
    optimum,
)
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
    """Returns size, tokens and loss of every finished trial with a finite value, except those whose loss blew up."""
    found = []
    for trial in load_trials(directory):
        is_used = has_value(trial) and not trial.blew_up
        size = model_size(Run(directory / str(trial.number))) if is_used else None
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
        undetermined: Names of the coefficients that the runs do not determine; their values are arbitrary.
        residual: Root mean square of log(measured / predicted).
        runs: Runs that the law was fitted to.
        optima: Optimal model size and tokens for the compute of the largest run, and for larger budgets. Empty if the
            runs do not determine a coefficient that these depend on.
        answer: The law in one line, or why there is none.
    """

    model_config = ConfigDict(extra="forbid")

    law: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    undetermined: list[str] = []  # earlier versions did not store it
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
        undetermined=list(fitted.undetermined),
        residual=fitted.residual,
        runs=runs,
        optima=[optimum(fitted, factor * largest) for factor in BUDGETS] if fitted.has_optimum else [],
        answer=_line(fitted),
    )


def print_scaling(scaling: ScalingAnswer) -> None:
    """Prints the coefficients, the optima for several budgets, and the law in one line."""
    console = get_console()
    print_table(_coefficients(scaling))
    if scaling.optima:
        print_table(_optima(scaling.optima))
    if scaling.undetermined:
        console.print(Text(_advice(scaling.undetermined), "yellow"))
    console.print(Text(scaling.answer, "bold"))
    summary = f"Fitted to {len(scaling.runs)} runs, RMS relative error {scaling.residual:.2%}."
    intervals = f"95% bootstrap confidence intervals ({RESAMPLES} resamples)."
    page = "See 'Reading the results of a sweep' in the documentation."
    console.print(Text(f"{summary} {intervals} {page}", "dim"))


def _coefficients(scaling: ScalingAnswer) -> FittingTable:
    table, law = FittingTable(), ScalingLaw(**scaling.law)
    for heading in ("coefficient", "estimate", "95% CI"):
        table.add_column(heading)
    unknown = {*scaling.undetermined, *({"a", "b"} if {"alpha", "beta"} & {*scaling.undetermined} else ())}
    for name, (low, high) in scaling.intervals.items():
        estimate = "not determined" if name in unknown else f"{getattr(law, name):.4g}"
        table.add_row(name, estimate, f"{low:.4g} to {high:.4g}")
    return table


def _optima(optima: list[Optimum]) -> FittingTable:
    table = FittingTable(see_also=f"{SCALING} has all columns.")
    for heading, order in (
        *(("FLOPs", None), ("optimal parameters", None), ("optimal tokens", None)),
        *(("tokens / parameters", 1), ("loss", 2)),
    ):
        table.add_column(heading, drop_order=order)
    for best in optima:
        ratio = f"{best.tokens[0] / best.parameters[0]:.3g}"
        table.add_row(
            f"{best.flops:.2e}",
            *(_format_interval(*values) for values in (best.parameters, best.tokens)),
            ratio,
            "not determined" if best.loss is None else _interval(*best.loss, ".3f"),
        )
    return table


def _advice(undetermined: list[str]) -> str:
    """Says why coefficients are not determined, and what would determine them."""
    return (
        f"The runs do not determine {', '.join(undetermined)}: the 95% interval spans more than a factor of "
        f"{MAX_SPAN:g}, reaches a bound of the fit, or other values fit as well. Vary model size and tokens "
        "independently of each other, each by a factor of ten or more, or add seeds."
    )


def write_scaling(scaling: ScalingAnswer, directory: Path) -> None:
    """Writes scaling.json."""
    write_durably(directory / SCALING, scaling.model_dump_json(indent=1) + "\n")


def _line(fitted: ScalingFit) -> str:
    """Formats the law with the exponents of the optima; coefficients that are not determined are left as letters."""
    law, unknown = fitted.law, fitted.undetermined
    E, A, B, alpha, beta = (name if name in unknown else f"{getattr(law, name):.3g}" for name in law._fields)  # noqa: N806
    loss = f"loss = {E} + {A} / N^{alpha} + {B} / D^{beta}"
    if not fitted.has_optimum:
        return f"no optimal model size, because the runs do not determine {', '.join(unknown)}; {loss}"
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
