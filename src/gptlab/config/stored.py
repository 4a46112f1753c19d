"""Completes the configuration of a run of an earlier version with the defaults in conf/. Imports no torch."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from gptlab.config.base import dotted_key, get_value
from gptlab.config.schema import RunConfig
from gptlab.config.search_path import configuration_folder
from gptlab.files import is_plain_name

BASES = {"model": "gpt", "data": "text", "trainer": "auto", "lora": "all"}  # options that have every key of their group
NESTED = ("callbacks", "logger")  # groups whose options add a mapping with their own name


def complete(stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Adds the keys that a stored configuration lacks because they did not exist when it was written.

    A key is added only if its group is there: the rest of a truncated file would otherwise be replaced by defaults.

    Args:
        stored: Configuration of a run, as nested plain data.

    Returns:
        The configuration, which may be invalid for other reasons, and the added values by dotted key.
    """
    values, added = deepcopy(dict(stored)), {}
    _move_flags(values)
    for key in _missing_keys(values):
        *parents, name = key.split(".")
        group, default = get_value(values, ".".join(parents)) if parents else values, _default(key, values)
        if isinstance(group, dict) and default is not None:
            group[name] = added[key] = default[0]
    return values, added


def _move_flags(values: dict[str, Any]) -> None:
    """Replaces flags of the Trainer by the key that now sets them."""
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and isinstance(flags := trainer.get("flags"), dict):
        if "deterministic" in flags:
            trainer["deterministic"] = bool(flags.pop("deterministic"))
        flags.pop("benchmark", None)


def _missing_keys(values: dict[str, Any]) -> list[str]:
    try:
        RunConfig.model_validate(values)
    except ValidationError as error:
        return [dotted_key(details, values) for details in error.errors() if details["type"] == "missing"]
    return []


def _default(key: str, values: dict[str, Any]) -> tuple[Any] | None:
    """Returns the default of a key in conf/, in a tuple; None if there is none, or if it is a whole group."""
    group, _, rest = key.partition(".")
    if group in NESTED:
        file, key = f"{group}/{rest.partition('.')[0]}", rest
    elif group in BASES:
        file, key = f"{group}/{BASES[group]}", rest
    elif rest and group != "train":
        file, key = f"{group}/{get_value(values, f'{group}.name')}", rest
    else:
        file = "train"
    if not is_plain_name(file.partition("/")[2] or file):  # the configuration may be a stranger's
        return None
    path = configuration_folder() / f"{file}.yaml"
    defaults = OmegaConf.load(path) if path.is_file() else DictConfig({})
    *parents, name = key.split(".")
    node = OmegaConf.select(defaults, ".".join(parents)) if parents else defaults
    if not isinstance(node, DictConfig) or name not in node:  # also if it is mandatory
        return None
    default = node[name]
    if isinstance(default, DictConfig) and default:
        return None
    return (OmegaConf.to_container(default, resolve=True) if OmegaConf.is_config(default) else default,)
