"""Report of a sweep: prints its results and writes them to files. Imports no torch."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from gptlab.errors import UserError
from gptlab.files import write_durably
from gptlab.sweeps.analysis.phrases import NOT_COMPARABLE, ONE_SEED, UNITS, plus_minus
from gptlab.sweeps.analysis.scaling_report import (
    fit_sweep,
    print_scaling,
    varies_size_and_length,
    write_scaling,
)
from gptlab.sweeps.analysis.significance import ALPHA
from gptlab.sweeps.analysis.table import AnswerRow, SweepAnswers, analyze_sweep
from gptlab.tables import FittingTable, print_table
from gptlab.terminal import get_console

CSV, JSON = "answers.csv", "answers.json"
LOSS = "loss"  # end of the names of metrics that follow a scaling law
RATIO = ".ratio"  # measured / forecast
RESULT = "result"  # heading of the verdicts
DIFFERENCE = "difference from baseline"
TIME, MEMORY = "time / forecast", "memory / forecast"
# columns that a narrow terminal omits, first to last
DROP_ORDER = (MEMORY, TIME, "tokens", "parameters", "seeds", "unfinished", "pruned", "failed")
STATISTICS = (  # columns of the CSV with fields of AnswerRow
    *("n", "mean", "se", "comparison", "compared", "difference", "difference_se", "low", "high", "p", "p_holm"),
    *("verdict", "is_baseline", "failed", "pruned", "unfinished", "tokens", "parameters"),
)


def report_sweep(directory: Path) -> SweepAnswers:
    """Prints the results of a sweep and writes them to answers.csv and answers.json in its directory.

    For a loss over model sizes and training lengths, also fits a scaling law, or prints why that is not possible.

    Raises:
        UserError: ``directory`` is not the directory of a sweep, or is damaged.
    """
    answers = analyze_sweep(directory)
    print_answers(answers)
    write_answers(answers, directory)
    if varies_size_and_length(directory) and answers.metric.endswith(LOSS):
        try:
            scaling = fit_sweep(directory)
        except UserError as error:
            get_console().print(Text(str(error), "yellow"))
        else:
            print_scaling(scaling)
            write_scaling(scaling, directory)
    return answers


def print_answers(answers: SweepAnswers) -> None:
    """Prints the table, the notes and the one-line answer."""
    console = get_console()
    print_table(_table(answers))
    for note in answers.notes:
        console.print(Text(note, "yellow"))
    console.print(Text(answers.answer, "bold"))
    console.print(Text(_legend(answers), "dim"))


def write_answers(answers: SweepAnswers, directory: Path) -> None:
    """Writes answers.csv and answers.json atomically."""
    write_csv(answers, directory / CSV)
    write_durably(directory / JSON, answers.model_dump_json(indent=1) + "\n")


def write_csv(answers: SweepAnswers, path: Path) -> None:
    """Writes a CSV row per point: its overrides, its statistics, and the scores of its forecast, if any."""
    scores = list(dict.fromkeys(name for row in answers.rows for name in row.forecast))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*answers.keys, *STATISTICS, *(f"forecast.{name}" for name in scores)])
    for row in answers.rows:
        settings = [row.settings.get(key) for key in answers.keys]
        writer.writerow([*settings, *(getattr(row, name) for name in STATISTICS), *map(row.forecast.get, scores)])
    write_durably(path, text.getvalue())


def _table(answers: SweepAnswers) -> FittingTable:
    """Builds the table; a narrow terminal omits forecasts and sizes first."""
    table = FittingTable(answers.question, see_also=f"{CSV} has all columns.")
    unit = UNITS.get(answers.metric)
    headings = _headings(answers.keys)
    keys = {name: [_setting(row.settings.get(key, "")) for row in answers.rows] for key, name in headings.items()}
    value = f"{answers.metric}{f', {unit}' if unit else ''}"
    differences = [_format(row.difference, row.difference_se) for row in answers.rows]
    results = [_short(row.verdict) for row in answers.rows]
    columns = {
        **keys,
        "seeds": [str(row.n) for row in answers.rows],
        value: [_format(row.mean, row.se) for row in answers.rows],
        **({DIFFERENCE: differences} if any(differences) else {}),
        **_counts(answers.rows),
        **_sizes(answers.rows, ("parameters", "tokens")),
        **_scores(answers.rows),
        **({RESULT: results} if any(results) else {}),
    }
    for name in columns:
        needed = name in keys or name in (value, RESULT, DIFFERENCE)
        order = None if needed else DROP_ORDER.index(name)
        table.add_column(
            name, "left" if name == RESULT or name in keys else "right", wraps=name == RESULT, drop_order=order
        )
    is_best = answers.answer.startswith("best")
    for row, cells in zip(answers.rows, zip(*columns.values(), strict=True), strict=True):
        table.add_row(
            *cells, style="dim" if row.mean is None else "bold" if is_best and row is answers.rows[0] else None
        )
    return table


def _setting(value: str) -> str:
    """Returns the value of an override; a sampled number to four digits, as the files have all of them."""
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d*\.\d{12,}(e-?\d+)?", value) else value


def _short(verdict: str) -> str:
    """Returns a verdict without the difference, the seeds and the failed trials, which have their own columns."""
    word, _, details = verdict.partition(" by ")
    if verdict == ONE_SEED:
        return "one seed"
    if verdict.startswith(NOT_COMPARABLE):
        return NOT_COMPARABLE
    return f"{word} (unpaired)" if "unpaired" in details else word


def _headings(keys: list[str]) -> dict[str, str]:
    """Returns a short heading for each varied key: the last part of its name, if that is unique."""
    short = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def _counts(rows: list[AnswerRow]) -> dict[str, list[str]]:
    """Returns the columns with the numbers of failed, pruned and unfinished trials, without empty columns."""
    columns = {name: [getattr(row, name) for row in rows] for name in ("failed", "pruned", "unfinished")}
    return {name: [str(count or "") for count in counts] for name, counts in columns.items() if any(counts)}


def _sizes(rows: list[AnswerRow], names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the columns of parameters and tokens, without those that are equal for all points."""
    columns = {name: [getattr(row, name) for row in rows] for name in names}
    return {
        name: [f"{size:,}" if size else "" for size in sizes]
        for name, sizes in columns.items()
        if len(set(sizes) - {None, 0}) > 1
    }


def _scores(rows: list[AnswerRow]) -> dict[str, list[str]]:
    """Returns the columns with the ratios of measured to forecast values; the files contain the other scores."""
    columns = {
        heading: [f"{row.forecast[name]:.2f}" if name in row.forecast else "" for row in rows]
        for name, heading in (
            (f"seconds{RATIO}", TIME),
            (f"peak_memory_bytes{RATIO}", MEMORY),
        )
    }
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _format(value: float | None, se: float | None) -> str:
    return "" if value is None else plus_minus(value, se)


def _legend(answers: SweepAnswers) -> str:
    tokens = {row.tokens for row in answers.rows} - {0}
    seen = f"{tokens.pop():,} tokens per run. " if len(tokens) == 1 else ""
    corrected = f", corrected for {answers.comparisons} comparisons" if answers.comparisons > 1 else ""
    return (
        f"{seen}± is one standard error. A difference is significant if p < {ALPHA}{corrected}. "
        "See 'Reading the results of a sweep' in the documentation."
    )
