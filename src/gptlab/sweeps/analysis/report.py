"""Report of a sweep: prints its results and writes them to files. Imports no torch."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from gptlab.errors import UserError
from gptlab.files import write_durably
from gptlab.sweeps.analysis.phrases import UNITS, plus_minus
from gptlab.sweeps.analysis.scaling_report import (
    LENGTHS,
    fit_sweep,
    print_scaling,
    varies_size_and_length,
    write_scaling,
)
from gptlab.sweeps.analysis.significance import ALPHA
from gptlab.sweeps.analysis.table import AnswerRow, SweepAnswers, analyze_sweep
from gptlab.terminal import get_console

CSV, JSON = "answers.csv", "answers.json"
MIN_WIDE_COLUMNS = 100  # minimum width of a terminal for all columns
RATIO = ".ratio"  # measured / forecast
RESULT = "result"  # heading of the verdicts
STATISTICS = (  # columns of the CSV with fields of AnswerRow
    *("n", "mean", "se", "comparison", "compared", "difference", "difference_se", "low", "high", "p", "p_holm"),
    *("verdict", "is_baseline", "failed", "pruned", "unfinished", "tokens", "parameters"),
)


def report_sweep(directory: Path) -> SweepAnswers:
    """Prints the results of a sweep and writes them to answers.csv and answers.json in its directory.

    For a sweep over model sizes and training lengths, also fits a scaling law, or prints why that is not possible.

    Raises:
        UserError: ``directory`` is not the directory of a sweep, or is damaged.
    """
    answers = analyze_sweep(directory)
    print_answers(answers)
    write_answers(answers, directory)
    if varies_size_and_length(directory):
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
    console.print(_table(answers, console.width))
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


def _table(answers: SweepAnswers, width: int) -> Table:
    """Builds the table for a terminal of ``width`` columns; a narrow one omits the difference and forecast columns."""
    table = Table(box=box.SIMPLE, title=Text(answers.question, "bold"), title_justify="left")
    unit = UNITS.get(answers.metric)
    keys = {name: [row.settings.get(key, "") for row in answers.rows] for key, name in _headings(answers.keys).items()}
    # a narrow table omits the tokens if it has a column with the length of training
    omits_tokens = width < MIN_WIDE_COLUMNS and any(key in LENGTHS for key in answers.keys)
    differences = [_format(row.difference, row.difference_se) for row in answers.rows]
    columns = {
        **keys,
        "seeds": [str(row.n) for row in answers.rows],
        f"{answers.metric}{f', {unit}' if unit else ''}": [_format(row.mean, row.se) for row in answers.rows],
        **({"difference\nfrom baseline": differences} if any(differences) and width >= MIN_WIDE_COLUMNS else {}),
        **_counts(answers.rows),
        **_sizes(answers.rows, ("parameters",) if omits_tokens else ("parameters", "tokens")),
        **(_scores(answers.rows) if width >= MIN_WIDE_COLUMNS else {}),
        RESULT: [row.verdict for row in answers.rows],
    }
    for name in columns:
        is_last, is_text = name == RESULT, name == RESULT or name in keys
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_last)
    for row, cells in zip(answers.rows, zip(*columns.values(), strict=True), strict=True):
        style = "dim" if row.mean is None else "bold" if row is answers.rows[0] else None
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


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
            (f"seconds{RATIO}", "time / forecast"),
            (f"peak_memory_bytes{RATIO}", "memory / forecast"),
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
