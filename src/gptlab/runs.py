"""Lists runs: python -m gptlab.runs [key=value ...]."""

import sys
import time
from typing import Literal

from omegaconf import DictConfig
from pydantic import PositiveFloat, PositiveInt

from gptlab.config.base import FrozenConfig, known_keys, validate
from gptlab.config.command import command
from gptlab.config.resolve import resolve_to_dict
from gptlab.errors import UserError
from gptlab.exit_codes import DONE
from gptlab.terminal import get_console, print_data, print_message
from gptlab.tracking.run_store.listing import (
    COLUMNS,
    Condition,
    format_csv,
    format_json,
    format_table,
    list_runs,
    split_unreadable,
)
from gptlab.tracking.run_store.runs import find_runs


class RunsCommand(FrozenConfig):
    """Configuration of ``python -m gptlab.runs``; see conf/runs.yaml."""

    runs: str | list[str]
    filter: str | None
    sort: str
    descending: bool
    columns: list[str]
    limit: PositiveInt | None
    watch: PositiveFloat | None
    format: Literal["table", "csv", "json"]


@command("runs", keys=set(known_keys(RunsCommand)), literal_keys=("runs", "filter"), subject="runs")
def main(values: DictConfig) -> int:
    """Prints one line per run."""
    config = validate(RunsCommand, resolve_to_dict(values))
    conditions = [Condition.parse(part) for part in (config.filter or "").split(",") if part.strip()]
    if config.watch is not None and not get_console().is_terminal:
        raise UserError(
            f"watch={config.watch:g} redraws the list, which needs a terminal. Set watch=null to print it once."
        )
    while True:
        readable, problems = split_unreadable(find_runs(config.runs))
        if not readable:
            raise UserError("\n".join(problems))
        for problem in problems:
            print_message(f"gptlab: {problem}", file=sys.stderr)
        lines = list_runs(readable, conditions, config.sort, descending=config.descending)
        shown = lines[: config.limit]
        match config.format:
            case "table":
                if config.watch is not None:
                    get_console().clear()
                table = format_table(shown, [*COLUMNS, *config.columns], left_out=len(lines) - len(shown))
                get_console().print(table, crop=False)
            case "csv":
                print_data(format_csv(shown, [*COLUMNS, *config.columns]), end="")
            case "json":
                print_data(format_json(shown, [*COLUMNS, *config.columns]), end="")
        if config.watch is None:
            return DONE
        time.sleep(config.watch)


if __name__ == "__main__":
    main()
