"""Measure gptlab, beside what people do without it: python -m gptlab.bench suite=<suite> [key=value ...]."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from gptlab.benchmarks.config import BenchCommand
from gptlab.benchmarks.measuring import ResultTable, print_result_table, write_report
from gptlab.config.base import known_keys, validate
from gptlab.config.command import command
from gptlab.config.resume import resolve_to_dict
from gptlab.errors import UserError
from gptlab.exit_codes import DONE
from gptlab.tracking.environment import record_environment
from gptlab.tracking.run_directory import claim_directory

ALL = ("train", "generate", "data", "overhead", "guards")  # the others need a text from elsewhere


@command("bench", keys=set(known_keys(BenchCommand)))
def main(values: DictConfig) -> int:
    """Measures, prints the tables, and writes the numbers with the environment."""
    config = validate(BenchCommand, resolve_to_dict(values))
    measured = {suite: _measure(suite, config) for suite in (ALL if config.suite == "all" else [config.suite])}
    directory = _directory(config.out)
    record_environment(directory)
    for suite, of_suite in measured.items():
        parts = []
        for part in of_suite:
            print_result_table(part)
            parts.append(part)
        print(f"Measured: {write_report(directory, suite, config.rounds, parts)}")
    return DONE


def _measure(suite: str, config: BenchCommand) -> Iterator[ResultTable]:
    """Starts a suite."""
    # with torch, which is not imported before the configuration is checked
    from gptlab.benchmarks import data, generation, overhead, speedrun, training

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
        case _:
            raise ValueError(suite)


def _directory(out: str | None) -> Path:
    """Creates the folder for the numbers."""
    try:
        if out is None:
            return claim_directory(Path("outputs/bench"))
        directory = Path(out).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made: {error}.") from error
    return directory


if __name__ == "__main__":
    main()
