"""Measure gptlab, beside what people do without it: python -m gptlab.bench suite=<suite> [key=value ...]."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig
from pydantic import PositiveInt

from gptlab.benchmarks import data, generation, guards, overhead, speedrun, training
from gptlab.benchmarks.measuring import ResultTable, print_result_table, write_report
from gptlab.config.base import FrozenConfig, known_keys, validate
from gptlab.config.command import command
from gptlab.config.resume import resolve_to_dict
from gptlab.errors import UserError
from gptlab.exit_codes import DONE
from gptlab.tracking.environment import record_environment
from gptlab.tracking.run_directory import claim_directory

ALL = ("train", "generate", "data", "overhead", "guards")  # the others need a text from elsewhere


class BenchCommand(FrozenConfig):
    """What to measure, and how often; see conf/bench.yaml."""

    suite: Literal["train", "generate", "data", "overhead", "guards", "speedrun", "ladder", "all"]
    rounds: PositiveInt
    out: str | None
    cache_dir: str
    preparation: data.PreparationBench
    loader: data.LoaderBench
    generate: generation.GenerateBench
    overhead: overhead.OverheadBench
    guards: guards.GuardsBench
    speedrun: speedrun.SpeedrunBench
    train: training.TrainBench


@command("bench", keys=set(known_keys(BenchCommand)))
def main(values: DictConfig) -> int:
    """Measure, print a table a part, and keep the numbers and what machine they are of."""
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
    """Begin a suite."""
    match suite:
        case "train":
            return training.measure(config.train, config.rounds)
        case "data":
            return data.measure(Path(config.cache_dir).expanduser(), config.preparation, config.loader, config.rounds)
        case "generate":
            return generation.measure(config.generate, config.rounds)
        case "overhead":
            return overhead.measure(config.overhead, config.cache_dir, config.rounds)
        case "guards":
            return guards.measure(config.guards, config.rounds)
        case "speedrun":
            return speedrun.time_to_loss(config.speedrun, config.cache_dir, config.rounds)
        case "ladder":
            return speedrun.ladder(config.speedrun, config.cache_dir, config.rounds)
        case _:
            raise ValueError(suite)


def _directory(out: str | None) -> Path:
    """Make the folder for the numbers."""
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
