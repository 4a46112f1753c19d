"""Which configuration a command line means: its own or, with resume=, that of an earlier run. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gptlab.config.schema import Config, check
from gptlab.data.prepare.splitting import resolve_val_split
from gptlab.errors import UserError
from gptlab.tracking.run_directory import load_config, newest_run

# What may change when a run goes on: its length, the devices, and what is logged and kept. All else would make it
# another run.
CHANGEABLE = (
    "resume",
    "force_resume",
    "train.max_steps",
    "train.max_tokens",
    "train.micro_batch_size",
    "train.log_every",
    "train.max_bad_steps",
    "train.spike_sigma",
    "train.spike_window",
    "data.cache_dir",
    "data.cache_limit_gb",
    "data.num_workers",
    "tokenizer.vocab_dir",
    "trainer",
    "callbacks",
    "logger",
)
BEGINNINGS = dict.fromkeys(("init_from", "resume_from_nanogpt"))  # of a new run, which one that goes on has behind it
FIXED = ("trainer.precision",)  # but not this, within those
AUTO = "auto"


def resolve(values: DictConfig, overrides: list[str]) -> Config:
    """Resolve and check what Hydra composed.

    Args:
        values: The composed configuration.
        overrides: Of the command line; on a resume they alone are applied to the earlier run's configuration. Where
            resume=auto has found the run, it is the whole configuration that must be the earlier one's.

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
    if composed["resume"] != AUTO:
        return _going_on(composed, named, Path(str(composed["resume"])).expanduser().absolute())
    new = check(Config, composed | {"resume": None})
    if (directory := newest_run(new.name)) is None:
        return new
    return goes_on(new, directory)


def goes_on(config: Config, directory: Path) -> Config:
    """Make of the configuration of a new run that of an earlier one, which goes on.

    Raises:
        UserError: They are not the same run.
    """
    return _going_on(config.with_absolute_paths().model_dump(mode="json"), _changes(config, directory), directory)


def with_val_split(config: Config) -> Config:
    """Resolve ``data.val_split=auto``, which is for new runs: a run that is resumed keeps its own."""
    return config.model_copy(update={"data": resolve_val_split(config.data)})


def differences(config: Config, directory: Path) -> list[str]:
    """Name the settings that make a configuration another run than an earlier one."""
    return [key for key in _changes(config, directory) if not _is_free(key)]


def _changes(config: Config, directory: Path) -> list[str]:
    """Name the settings that differ from an earlier run's, except those that are left to the tokenizer or the data."""
    values, earlier = (c.with_absolute_paths().model_dump(mode="json") for c in (config, load_config(directory)))
    keys = {*_leaves(values), *_leaves(earlier)} - BEGINNINGS.keys()
    if values["model"]["vocab_size"] is None:
        keys.remove("model.vocab_size")
    if config.data.val_split == "auto":
        keys.remove("data.val_split")
    return sorted(key for key in keys if _at(values, key) != _at(earlier, key))


def _going_on(values: dict[str, Any], named: list[str], directory: Path) -> Config:
    """Apply the values that are named to the configuration of an earlier run; UserError for one that cannot change."""
    earlier = load_config(directory).model_dump(mode="json")
    precision = earlier["trainer"]["precision"]
    if _at(values, "data.val_split") == "auto":
        values["data"]["val_split"] = earlier["data"]["val_split"]
    for key in named:
        if not _is_free(key) and not values.get("force_resume") and _at(values, key, key) != _at(earlier, key):
            raise UserError(
                f"{key} cannot change when a run is resumed: it would be another run. "
                f"What can: {', '.join(CHANGEABLE)} (but {', '.join(FIXED)}). To start a new run from these weights: "
                f"init_from={directory}. To go on all the same: force_resume=true"
            )
        if key.partition(".")[0] in values:
            _copy(key.split("."), values, earlier)
    if "trainer" in named and "trainer.precision" not in named:
        earlier["trainer"]["precision"] = precision  # the devices were named, not what is computed on them
    forced = bool(values.get("force_resume"))
    return check(Config, earlier | {"resume": str(directory), "force_resume": forced, **BEGINNINGS})


def plain(values: DictConfig) -> dict[str, Any]:
    """Resolve a composed configuration into plain data; UserError names a mandatory value that is missing."""
    try:
        plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{key} is missing: name it on the command line, {key}=<value>.") from None
    assert isinstance(plain, dict)  # noqa: S101
    return {str(key): value for key, value in plain.items()}


def _is_free(key: str) -> bool:
    """Whether a setting may change on a resume."""

    def is_in(groups: tuple[str, ...]) -> bool:
        return any(key == group or key.startswith(f"{group}.") for group in groups)

    return is_in(CHANGEABLE) and not is_in(FIXED)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _at(values: Any, key: str, default: Any = None) -> Any:
    """Return the value of a dotted name."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values


def _copy(path: list[str], source: dict[str, Any], target: dict[str, Any]) -> None:
    """Copy one value, or the group that it is in where one of the two has no such group."""
    for part in path[:-1]:
        if target.get(part) is None or source.get(part) is None:
            target[part] = source.get(part)
            return
        source, target = source[part], target[part]
    if path[-1] in source:
        target[path[-1]] = source[path[-1]]
    else:
        del target[path[-1]]
