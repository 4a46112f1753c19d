"""Benchmarks gptlab against common alternatives: python -m gptlab.bench suite=<suite> [key=value ...]."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from omegaconf import DictConfig

from gptlab.benchmarks.config import BenchCommand
from gptlab.benchmarks.measuring import REPORT_MARK, ResultTable, print_result_table, write_report
from gptlab.config.base import known_keys, validate
from gptlab.config.command import command
from gptlab.config.locations import outputs_folder
from gptlab.config.resolve import resolve_to_dict
from gptlab.errors import UserError, failure_reason
from gptlab.exit_codes import DONE
from gptlab.files import check_output_directory
from gptlab.terminal import print_message
from gptlab.tracking.environment import record_environment
from gptlab.tracking.run_directory import claim_directory

ALL = ("train", "generate", "data", "overhead", "guards")  # the others take longer or need a text to be downloaded


@command("bench", keys=set(known_keys(BenchCommand)))
def main(values: DictConfig) -> int:
    """Runs the benchmark suites, prints their tables, and writes the results and the environment."""
    config = validate(BenchCommand, resolve_to_dict(values))
    if config.out is not None:
        names = (f"{suite}.json" for suite in get_args(BenchCommand.model_fields["suite"].annotation))
        out = Path(config.out).expanduser()
        check_output_directory(out, "out", names, REPORT_MARK, overwrite=config.overwrite)
    measured = {suite: _measure(suite, config) for suite in (ALL if config.suite == "all" else [config.suite])}
    directory = _create_directory(config.out)
    record_environment(directory)
    for suite, tables in measured.items():
        parts = []
        for part in tables:
            print_result_table(part)
            parts.append(part)
        print_message(f"Results: {write_report(directory, suite, config.rounds, parts)}")
    return DONE


def _measure(suite: str, config: BenchCommand) -> Iterator[ResultTable]:
    """Returns an iterator that runs a suite; raises UserError if the suite cannot run."""
    # lazy: imports torch, which is not needed to check the config
    from gptlab.benchmarks import data, forecasts, generation, overhead, speedrun, training

    match suite:
        case "train":
            return training.measure(config.train, config.rounds)
        case "data":
            return data.measure(Path(config.cache_dir).expanduser(), config.preparation, config.loader, config.rounds)
        case "generate":
            return generation.measure(config.generate, config.rounds)
        case "overhead":
            return overhead.measure_overhead(config.overhead, config.cache_dir, config.rounds)
        case "guards":
            return overhead.measure_guards(config.guards, config.rounds)
        case "speedrun":
            return speedrun.time_to_loss(config.speedrun, config.cache_dir, config.rounds)
        case "ladder":
            return speedrun.ladder(config.speedrun, config.cache_dir, config.rounds)
        case "plan":
            return forecasts.compare_forecasts(config.plan, config.rounds)
        case _:
            raise ValueError(suite)


def _create_directory(out: str | None) -> Path:
    """Creates the directory of the results."""
    try:
        if out is None:
            return claim_directory(outputs_folder() / "bench")
        directory = Path(out).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be created: {failure_reason(error)}.") from error
    return directory


if __name__ == "__main__":
    main()
