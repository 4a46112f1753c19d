"""Configuration of a resumed run: that of the earlier run with the keys that are changed. Imports no torch."""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptlab.config.base import copy_key, get_value, validate
from gptlab.config.components import TARGET
from gptlab.config.locations import check_locations
from gptlab.config.schema import RunConfig
from gptlab.config.trust import check_trusted
from gptlab.errors import UserError
from gptlab.tracking.run_directory import (
    check_is_saved,
    check_weights_fit,
    newest_checkpoint,
    newest_step,
)
from gptlab.training.checkpoints.records import checkpoint_step
from gptlab.training.distributed.processes import is_restarted

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: its length, devices, logging and checkpoints. A change of any other key
# would make it a different run.
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
    "data.max_expansion",
    "data.num_workers",
    "tokenizer.vocab_dir",
    "tokenizer.path",  # a resumed run uses the tokenizer of its manifest
    "trainer",
    "callbacks",
    "logger",
)
FIXED_KEYS = ("trainer.precision",)  # exceptions from the keys above
START_KEYS = ("init_from", "resume_from_nanogpt")  # where a new run starts; irrelevant for a resumed run
PADDING = "model.pad_vocab_to_multiple_of"  # auto: a resumed run keeps its number of rows
COMPONENT_GROUPS = ("callbacks", "logger")  # groups of which a run has several options


def merge_resume_config(
    values: dict[str, Any], overridden: Iterable[str], run_dir: Path, earlier_config: RunConfig
) -> RunConfig:
    """Applies overridden keys to the configuration of an earlier run and validates the result.

    An option of ``callbacks`` or ``logger`` that the run already has keeps the run's values, except for overridden
    keys. Changed keys are logged.

    Args:
        values: Composed configuration with the values of the overridden keys.
        overridden: Dotted names of the overridden keys or groups.
        run_dir: Directory of the earlier run.
        earlier_config: Configuration of the earlier run.

    Returns:
        The validated configuration of the resumed run.

    Raises:
        UserError: A key cannot change when a run is resumed; a component or a path of the earlier run is not trusted;
            or, with force_resume=true, the weights do not fit.
    """
    earlier, is_forced = earlier_config.model_dump(mode="json"), bool(values.get("force_resume"))
    changed_config = _apply(values, overridden, earlier)
    changed = [*_changed_keys(changed_config, earlier_config), *_changed_starts(changed_config, earlier_config)]
    now, before = (c.with_absolute_paths().model_dump(mode="json") for c in (changed_config, earlier_config))
    if not is_forced and (fixed := [key for key in changed if not may_change(key)]):
        changes = ", ".join(_describe_changes(fixed, before, now))
        raise UserError(
            f"{', '.join(fixed)} cannot change when a run is resumed, since that would make it a different run: "
            f"{changes}. Keys that can change: {', '.join(CHANGEABLE_KEYS)} (except {', '.join(FIXED_KEYS)}). To "
            f"start a new run from these weights: init_from={run_dir}. To resume anyway: force_resume=true"
        )
    for key in changed:
        copy_key(key.split("."), now, earlier)
    start = dict.fromkeys(START_KEYS)
    merged = validate(RunConfig, earlier | {"resume": str(run_dir), "force_resume": is_forced, **start})
    check_trusted(merged.model_dump(mode="json"), run_dir)
    check_locations(merged, run_dir, given=values)
    if is_forced:
        merged = _keep_past_batches(merged, earlier_config, run_dir)
        check_weights_fit(run_dir, earlier_config.model, merged.model, cropped=False)
    if changed:
        log.info("%-9s %s", "changed", ", ".join(_describe_changes(changed, before, now)))
    return merged


def check_is_newest(run_dir: Path, checkpoint: Path, named: str) -> None:
    """Checks that a checkpoint to resume is the newest intact one, since a resume would discard the steps after it.

    Not checked in a restarted job, which has saved newer ones before.

    Raises:
        UserError: The checkpoint does not exist, is damaged or is not the newest one.
    """
    check_is_saved(checkpoint, named)
    if is_restarted() or (newest := newest_checkpoint(run_dir)) == checkpoint:
        return
    later = checkpoint_step(newest) > checkpoint_step(checkpoint)
    problem = f"would discard the later steps, up to {newest.name}" if later else "cannot be used: it is damaged"
    raise UserError(
        f"{named} {problem}. To resume from {newest.name}: resume={run_dir}. To start a new run from weights: "
        f"init_from={checkpoint if later else newest}."
        + (" To discard the later steps: first move the later checkpoints to another directory." if later else "")
    )


def _describe_changes(keys: Iterable[str], before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields a description of each changed key; a callback or logger that is added or removed is one change."""
    groups = {".".join(key.split(".")[:2]): key for key in keys if key.startswith(COMPONENT_GROUPS)}
    added = {group for group in groups if get_value(before, group) is None}
    removed = {group for group in groups if get_value(now, group) is None}
    yield from (f"{group} added" for group in sorted(added))
    yield from (f"{group} removed" for group in sorted(removed))
    for key in keys:
        if not key.startswith(tuple(added | removed)):
            yield f"{key}={get_value(now, key)} (was {get_value(before, key)})"


def _apply(values: dict[str, Any], overridden: Iterable[str], earlier: dict[str, Any]) -> RunConfig:
    """Returns the configuration of an earlier run with the overridden keys or groups of ``values``."""
    values, changed = copy.deepcopy(values), copy.deepcopy(earlier)
    if get_value(values, "data.val_split") == "auto":
        values["data"]["val_split"] = earlier["data"]["val_split"]
    if get_value(values, PADDING) == "auto":
        copy_key(PADDING.split("."), earlier, values)
    keys = sorted(overridden, key=lambda key: key.count("."))  # groups first
    for key in keys:
        if key in COMPONENT_GROUPS:
            changed[key] = _select_components(values[key], earlier[key], key, keys)
        elif key.partition(".")[0] in values:
            copy_key(key.split("."), values, changed)
    if "trainer" in keys:  # a trainer option selects devices only
        for name in ("precision", "deterministic"):
            if f"trainer.{name}" not in keys:
                changed["trainer"][name] = earlier["trainer"][name]
    return validate(RunConfig, changed | {"resume": None, "force_resume": False})


def _select_components(
    selected: dict[str, Any], earlier: dict[str, Any], group: str, overridden: Sequence[str]
) -> dict[str, Any]:
    """Returns the selected callbacks or loggers; those that the run already has keep its values, which is logged."""
    nodes = dict(selected)
    for name, node in selected.items():
        if node is None or (kept := earlier.get(name)) is None or kept.get(TARGET) != node.get(TARGET):
            continue
        nodes[name] = kept
        keys = (f"{group}.{name}.{key}" for key in node if key in kept and kept[key] != node[key])
        if differ := [f"{key}={kept[key.rpartition('.')[2]]}" for key in keys if key not in overridden]:
            log.info("%-9s %s", "kept", ", ".join(differ))
    return nodes


def _keep_past_batches(config: RunConfig, earlier: RunConfig, run_dir: Path) -> RunConfig:
    """Records the batch sizes of the steps before the checkpoint, if those of the next steps are changed."""
    changed = {
        key: getattr(config.train, key)
        for key in ("global_batch_size", "batch_schedule")
        if getattr(config.train, key) != getattr(earlier.train, key)
    }
    if not changed or not (step := newest_step(run_dir)):
        return config
    return config.model_copy(
        update={"train": config.train.model_copy(update={"past_batches": earlier.train.batches_until(step)})}
    )


def resume_as(config: RunConfig, run_dir: Path, earlier_config: RunConfig) -> RunConfig:
    """Returns the configuration that resumes an earlier run with the changeable keys of a new configuration.

    Args:
        config: New configuration.
        run_dir: Directory of the earlier run.
        earlier_config: Configuration of the earlier run.

    Raises:
        UserError: A key differs that cannot change when a run is resumed, or a component is not trusted.
    """
    values = config.with_absolute_paths().model_dump(mode="json")
    return merge_resume_config(values, _changed_keys(config, earlier_config), run_dir, earlier_config)


def identity_changes(config: RunConfig, earlier_config: RunConfig) -> list[str]:
    """Returns the keys that differ and cannot change on a resume, since they make it a different run."""
    return [key for key in _changed_keys(config, earlier_config) if not may_change(key)]


def _changed_keys(config: RunConfig, earlier_config: RunConfig) -> list[str]:
    """Returns the keys that differ from an earlier run's, except those determined by the tokenizer or the data."""
    values, earlier = (c.with_absolute_paths().model_dump(mode="json") for c in (config, earlier_config))
    keys = {*_leaf_keys(values), *_leaf_keys(earlier)} - {*START_KEYS}
    if values["model"]["vocab_size"] is None:
        keys.remove("model.vocab_size")
    if config.data.val_split == "auto":
        keys.remove("data.val_split")
    if config.model.pad_vocab_to_multiple_of == "auto":
        keys.remove(PADDING)
    if earlier_config.data.end_at_cut and not config.data.end_at_cut:
        keys.discard("data.end_at_cut")  # runs of earlier versions keep it
    if not config.train.past_batches:
        keys.discard("train.past_batches")  # set by a forced resume
    return sorted(key for key in keys if get_value(values, key) != get_value(earlier, key))


def _changed_starts(config: RunConfig, earlier_config: RunConfig) -> list[str]:
    """Returns the keys of the start of a run that differ from an earlier run's."""
    config = config.with_absolute_paths()
    return [key for key in START_KEYS if getattr(config, key) != getattr(earlier_config, key)]


def may_change(key: str) -> bool:
    """Whether a key may change when a run is resumed."""

    def is_in(groups: tuple[str, ...]) -> bool:
        return any(key == group or key.startswith(f"{group}.") for group in groups)

    return is_in(CHANGEABLE_KEYS) and not is_in(FIXED_KEYS)


def _leaf_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all leaf values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name
