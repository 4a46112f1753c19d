"""Which configuration a command line means: its own or, with resume=, that of an earlier run. Imports no torch."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gptlab.errors import UserError
from gptlab.experiments.directory import load_config
from gptlab.experiments.schema import Config, check

# What may change when a run goes on: its length, the devices, and what is logged and kept. All else would make it
# another run.
CHANGEABLE = (
    "resume",
    "train.max_steps",
    "train.max_tokens",
    "train.micro_batch_size",
    "train.log_every",
    "data.cache_dir",
    "data.cache_limit_gb",
    "data.num_workers",
    "tokenizer.vocab_dir",
    "trainer",
    "callbacks",
    "logger",
)


def resolve(values: DictConfig, overrides: list[str]) -> Config:
    """Resolve and check what Hydra composed.

    Args:
        values: The composed configuration.
        overrides: Of the command line; on a resume they alone are applied to the earlier run's configuration.

    Raises:
        UserError: A value is missing or wrong, or a resume would change what the run is.
    """
    composed = plain(values)
    named = [override.lstrip("+").partition("=")[0] for override in overrides]
    if "train.max_tokens" in named and "train.max_steps" not in named:
        composed["train"]["max_steps"] = None  # the default length gives way to the one that was named
        named.append("train.max_steps")
    elif "train.max_steps" in named and "train.max_tokens" not in named:
        named.append("train.max_tokens")  # which is null where it is not named
    if composed.get("resume") is None:
        return check(Config, composed)
    directory = Path(str(composed["resume"])).expanduser().absolute()
    config = load_config(directory).model_dump(mode="json")
    for key in named:
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE):
            raise UserError(
                f"{key} cannot change when a run is resumed: it would be another run. "
                f"What can: {', '.join(CHANGEABLE)}. To start a new run from these weights: init_from={directory}"
            )
        _copy(key.split("."), composed, config)
    return check(Config, config | {"resume": str(directory), "init_from": None})


def plain(values: DictConfig) -> dict[str, Any]:
    """Resolve a composed configuration into plain data; UserError names a mandatory value that is missing."""
    try:
        plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{key} is missing: name it on the command line, {key}=<value>.") from None
    assert isinstance(plain, dict)  # noqa: S101
    return {str(key): value for key, value in plain.items()}


def _copy(path: list[str], source: dict[str, Any], target: dict[str, Any]) -> None:
    """Copy one value, or a whole group, from one nested dictionary to another."""
    for part in path[:-1]:
        if target.get(part) is None:  # a whole group that the earlier run did not have
            target[part] = source[part]
        source, target = source[part], target[part]
    target[path[-1]] = source[path[-1]]
