"""Configurations composed like those of the train command, and sweep files."""

from typing import Any

import yaml
from hydra import compose, initialize_config_dir

from gptlab.config.command import configuration_folder
from gptlab.config.resolve import resolve
from gptlab.config.schema import RunConfig


def resolved(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        return resolve(compose("train", overrides=list(overrides)), list(overrides))


def read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the config keys that a sweep file sets, and those of its sweeper."""
    values = yaml.safe_load((configuration_folder() / "sweeps" / f"{name}.yaml").read_text())
    return values, values.pop("hydra")["sweeper"]
