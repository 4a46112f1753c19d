"""Run directories: outputs/<name>/<time>/, which hold everything that is kept of one run. Imports no torch."""

import time
from pathlib import Path

import yaml

from gptlab.data.shards import Manifest, write_durably
from gptlab.errors import UserError
from gptlab.experiments.environment import record_environment
from gptlab.experiments.schema import Config, check
from gptlab.model.config import GPTConfig

CONFIG, LOG, CHECKPOINTS, SAMPLES = "config.yaml", "train.log", "checkpoints", "samples"


def create(config: Config, manifest: Manifest, place: Path | None) -> Path:
    """Make the directory of a new run, with its configuration, data manifest and environment.

    Args:
        config: Complete: what is written is enough to run it again.
        manifest: Of the data, with the tokenizer.
        place: The directory, where it is not to be named by the time.
    """
    try:
        directory = new_directory(Path("outputs") / config.name) if place is None else place
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"No run directory can be made in {Path.cwd() / 'outputs'}: {error}.") from error
    manifest.save(directory)
    record(config, directory)
    return directory.absolute()


def record(config: Config, directory: Path) -> None:
    """Write the configuration and the environment of a run, anew when it goes on with others."""
    values = config.model_copy(update={"resume": None}).model_dump(mode="json")
    write_durably(directory / CONFIG, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    record_environment(directory)


def new_directory(parent: Path) -> Path:
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
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the configuration of a run.")
    return check(Config, values)


def find_checkpoint(directory: Path, *names: str) -> Path:
    """Find the first of the checkpoints of a run that exists; UserError where none does."""
    for name in names:
        if (path := directory / CHECKPOINTS / name).exists():
            return path
    raise UserError(f"{directory} has no checkpoint yet: none of {', '.join(names)} is in {directory / CHECKPOINTS}.")


# What decides which parameters there are, and their shapes; a longer block can be cropped to a shorter one.
SHAPING = ("vocab_size", "n_layer", "n_head", "n_embd", "bias", "tie_weights", "pad_vocab_to_multiple_of")


def check_fit(directory: Path, model: GPTConfig) -> None:
    """See that the weights of a run fit a model; UserError names what differs."""
    there = load_config(directory).model
    differences = [key for key in SHAPING if getattr(there, key) != getattr(model, key)]
    if there.block_size < model.block_size:
        differences.append("block_size")
    if differences:
        named = (f"model.{key} is {getattr(there, key)} there and {getattr(model, key)} here" for key in differences)
        raise UserError(f"The weights of {directory} do not fit this model: {'; '.join(named)}.")
