"""Run directories: outputs/<name>/<time>/, which hold everything that is kept of one run. Imports no torch."""

import time
from pathlib import Path

import yaml

from gptlab.data.shards import Manifest
from gptlab.errors import UserError
from gptlab.experiments.environment import record_environment
from gptlab.experiments.schema import Config, check

CONFIG, LOG, CHECKPOINTS, SAMPLES = "config.yaml", "train.log", "checkpoints", "samples"


def create(config: Config, manifest: Manifest, place: Path | None) -> Path:
    """Make the directory of a new run, with its configuration, data manifest and environment.

    Args:
        config: Complete: what is written is enough to run it again.
        manifest: Of the data, with the tokenizer.
        place: The directory, where it is not to be named by the time.
    """
    directory = _new_directory(Path("outputs") / config.name) if place is None else place
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    manifest.save(directory)
    record_environment(directory)
    return directory.absolute()


def _new_directory(parent: Path) -> Path:
    """Claim a directory that nobody else has, named by the time."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for name in (stamp, *(f"{stamp}-{i}" for i in range(2, 1000))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return parent / name
    raise UserError(f"{parent} already holds a thousand runs of {stamp}.")


def load_config(directory: Path) -> Config:
    """Read the configuration of a run; UserError where ``directory`` is none."""
    path = directory / CONFIG
    if not path.is_file():
        missing = f"there is no {CONFIG} in it" if directory.is_dir() else "there is no such directory"
        raise UserError(f"{directory} is not a run directory: {missing} (looked from {Path.cwd()}).")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the configuration of a run.")
    return check(Config, values)


def find_checkpoint(directory: Path, *names: str) -> Path:
    """Find the first of the checkpoints of a run that exists; UserError where none does."""
    for name in names:
        if (path := directory / CHECKPOINTS / name).exists():
            return path
    raise UserError(f"{directory} has no checkpoint yet: none of {', '.join(names)} is in {directory / CHECKPOINTS}.")
