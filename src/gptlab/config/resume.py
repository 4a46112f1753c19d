"""Which configuration a command line means: its own or, with resume=, that of an earlier run. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gptlab.config.base import validate
from gptlab.config.schema import RunConfig
from gptlab.data.prepare.splitting import resolve_val_split
from gptlab.errors import UserError
from gptlab.tracking.run_directory import check_weights_fit, load_config, newest_run

# Keys that may change when a run is resumed: its length, the devices, and what is logged and kept. Any other would make
# it another run.
CHANGEABLE_KEYS = (
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
FIXED_KEYS = ("trainer.precision",)  # within those, but may not change
START_KEYS = ("init_from", "resume_from_nanogpt")  # where a new run starts from; a resumed run has that behind it
AUTO = "auto"


def resolve(values: DictConfig, overrides: list[str]) -> RunConfig:
    """Resolves and validates what Hydra composed.

    Args:
        values: The composed configuration.
        overrides: Overrides of the command line. With resume=<run directory>, only these change the configuration of
            the earlier run. With resume=auto, the whole configuration has to be that of the earlier run.

    Raises:
        UserError: A value is missing or wrong, or may not change when a run is resumed.
    """
    composed = resolve_to_dict(values)
    overridden = [override.lstrip("+").partition("=")[0] for override in overrides]
    if "train.max_tokens" in overridden and "train.max_steps" not in overridden:
        composed["train"]["max_steps"] = None  # the default length gives way to the one that was given
        overridden.append("train.max_steps")
    elif "train.max_steps" in overridden and "train.max_tokens" not in overridden:
        overridden.append("train.max_tokens")  # which is null where it is not given
    if composed.get("resume") is None:
        return validate(RunConfig, composed)
    if composed["resume"] != AUTO:
        run_dir = Path(str(composed["resume"])).expanduser().absolute()
        return merge_resume_config(composed, overridden, run_dir, load_config(run_dir))
    new = validate(RunConfig, composed | {"resume": None})
    if (newest := newest_run(new.name)) is None:
        return new
    return resume_as(new, newest, load_config(newest))


def merge_resume_config(
    values: dict[str, Any], overridden: list[str], run_dir: Path, earlier_config: RunConfig
) -> RunConfig:
    """Applies overridden keys to the configuration of an earlier run, and validates the result.

    Args:
        values: Holds the values of the overridden keys.
        overridden: Dotted names of keys or groups.
        run_dir: The earlier run, which is resumed.
        earlier_config: Its configuration.

    Raises:
        UserError: A key may not change when a run is resumed; with force_resume=true, the weights do not fit.
    """
    earlier = earlier_config.model_dump(mode="json")
    precision, is_forced = earlier["trainer"]["precision"], bool(values.get("force_resume"))
    if _get(values, "data.val_split") == "auto":
        values["data"]["val_split"] = earlier["data"]["val_split"]
    for key in overridden:
        if not _may_change(key) and not is_forced and _get(values, key, key) != _get(earlier, key):
            raise UserError(
                f"{key} cannot change when a run is resumed: it would be another run. "
                f"What can: {', '.join(CHANGEABLE_KEYS)} (but {', '.join(FIXED_KEYS)}). To start a new run from these "
                f"weights: init_from={run_dir}. To resume anyway: force_resume=true"
            )
        if key.partition(".")[0] in values:
            _copy_key(key.split("."), values, earlier)
    if "trainer" in overridden and "trainer.precision" not in overridden:
        earlier["trainer"]["precision"] = precision  # the devices were chosen, not the precision
    start = dict.fromkeys(START_KEYS)
    merged = validate(RunConfig, earlier | {"resume": str(run_dir), "force_resume": is_forced, **start})
    if is_forced:
        check_weights_fit(run_dir, earlier_config.model, merged.model, cropped=False)
    return merged


def resume_as(config: RunConfig, run_dir: Path, earlier_config: RunConfig) -> RunConfig:
    """Turns the configuration of a new run into that of an earlier run, which is resumed.

    Raises:
        UserError: They are not the same run.
    """
    values = config.with_absolute_paths().model_dump(mode="json")
    return merge_resume_config(values, _changed_keys(config, earlier_config), run_dir, earlier_config)


def resolve_split(config: RunConfig) -> RunConfig:
    """Resolves ``data.val_split=auto``, which is for new runs: a resumed run keeps its split."""
    return config.model_copy(update={"data": resolve_val_split(config.data)})


def identity_changes(config: RunConfig, earlier_config: RunConfig) -> list[str]:
    """Returns the keys that differ and may not change on a resume: those that make it another run."""
    return [key for key in _changed_keys(config, earlier_config) if not _may_change(key)]


def _changed_keys(config: RunConfig, earlier_config: RunConfig) -> list[str]:
    """Returns the keys that differ from an earlier run's, without those that the tokenizer or the data decides."""
    values, earlier = (c.with_absolute_paths().model_dump(mode="json") for c in (config, earlier_config))
    keys = {*_leaf_keys(values), *_leaf_keys(earlier)} - {*START_KEYS}
    if values["model"]["vocab_size"] is None:
        keys.remove("model.vocab_size")
    if config.data.val_split == "auto":
        keys.remove("data.val_split")
    return sorted(key for key in keys if _get(values, key) != _get(earlier, key))


def resolve_to_dict(values: DictConfig) -> dict[str, Any]:
    """Resolves a composed configuration into plain data; UserError names a mandatory value that is missing."""
    try:
        container = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{key} is missing: name it on the command line, {key}=<value>.") from None
    assert isinstance(container, dict)  # noqa: S101
    return {str(key): value for key, value in container.items()}


def _may_change(key: str) -> bool:
    """Whether a key may change when a run is resumed."""

    def is_in(groups: tuple[str, ...]) -> bool:
        return any(key == group or key.startswith(f"{group}.") for group in groups)

    return is_in(CHANGEABLE_KEYS) and not is_in(FIXED_KEYS)


def _leaf_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all values that are no groups."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _get(values: Any, key: str, default: Any = None) -> Any:
    """Returns the value of a dotted name."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values


def _copy_key(path: list[str], source: dict[str, Any], target: dict[str, Any]) -> None:
    """Copies one value, or its whole group where one of the two does not have that group."""
    for part in path[:-1]:
        if target.get(part) is None or source.get(part) is None:
            target[part] = source.get(part)
            return
        source, target = source[part], target[part]
    if path[-1] in source:
        target[path[-1]] = source[path[-1]]
    else:
        del target[path[-1]]
