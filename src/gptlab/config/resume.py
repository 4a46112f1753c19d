"""Resolves the configuration of a new or a resumed run. Imports no torch."""

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gptlab.config.base import get_value, validate
from gptlab.config.components import TARGET, is_component
from gptlab.config.locations import TRUST_PATHS_KEY, check_locations, trust_paths
from gptlab.config.schema import RunConfig
from gptlab.config.trust import TRUST_KEY, check_trusted, trust_components, trust_packages
from gptlab.data.prepare.splitting import resolve_val_split
from gptlab.errors import UserError
from gptlab.tracking.run_directory import (
    check_is_saved,
    check_weights_fit,
    load_config,
    newest_checkpoint,
    newest_run,
    newest_step,
    split_checkpoint,
)
from gptlab.tracking.run_store.runs import CONFIG
from gptlab.training.checkpoints.records import checkpoint_step

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
    "trainer",
    "callbacks",
    "logger",
)
FIXED_KEYS = ("trainer.precision",)  # exceptions from the keys above
_MISSING = object()  # get_value returns it for a key that does not exist
START_KEYS = ("init_from", "resume_from_nanogpt")  # where a new run starts; irrelevant for a resumed run
AUTO = "auto"
COMPONENT_GROUPS = ("callbacks", "logger")  # groups of which a run has several options


def add_keys_of_run(overrides: Sequence[str]) -> list[str]:
    """Makes keys of the run that ``resume=<run directory>`` names valid on the command line.

    Hydra composes the default options, which do not have the keys of the run's own options, such as
    ``logger.wandb.mode``. ``key=value`` becomes ``++key=value``, and ``~callbacks.<name>`` becomes
    ``++callbacks.<name>=null``.

    Args:
        overrides: Overrides of the command line.

    Returns:
        The overrides; unchanged without ``resume=<run directory>``.

    Raises:
        UserError: The configuration of the run cannot be read.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:  # Hydra reports it
        return list(overrides)
    named = next((override.value() for override in reversed(parsed) if override.key_or_group == "resume"), None)
    if named in (None, AUTO):
        return list(overrides)
    run_dir, _ = split_checkpoint(Path(str(named)).expanduser().absolute())
    earlier = load_config(run_dir, f"resume={named}").model_dump(mode="json")
    rewritten = list(overrides)
    for number, override in enumerate(parsed):
        key = override.key_or_group
        if "." not in key or get_value(earlier, key, _MISSING) is _MISSING:
            continue
        if override.type == OverrideType.CHANGE:
            rewritten[number] = f"++{overrides[number]}"
        elif override.type == OverrideType.DEL and key.startswith(COMPONENT_GROUPS):
            rewritten[number] = f"++{key}=null"
    return rewritten


def resolve(values: DictConfig, overrides: list[str]) -> RunConfig:
    """Resolves and validates a composed configuration.

    Args:
        values: Configuration composed by Hydra.
        overrides: Overrides of the command line. With resume=<run directory>, only these change the configuration of
            the earlier run. With resume=auto, the configurations may differ only in ``CHANGEABLE_KEYS``.

    Returns:
        The validated configuration, which is that of the earlier run with the overrides if a run is resumed.

    Raises:
        UserError: A value is missing or invalid, a changed key cannot change when a run is resumed, or the run to
            resume cannot be read.
    """
    composed = replace_built_ins(resolve_to_dict(values), overrides)
    overridden = [override.lstrip("+~").partition("=")[0] for override in overrides]
    overridden = [key for key in overridden if key not in (TRUST_KEY, TRUST_PATHS_KEY)]
    if "train.max_tokens" in overridden and "train.max_steps" not in overridden:
        composed["train"]["max_steps"] = None  # the given length replaces the default one
        overridden.append("train.max_steps")
    elif "train.max_steps" in overridden and "train.max_tokens" not in overridden:
        overridden.append("train.max_tokens")  # null by default
    if composed.get("resume") not in (None, AUTO):
        named = f"resume={composed['resume']}"
        run_dir, checkpoint = split_checkpoint(Path(str(composed["resume"])).expanduser().absolute())
        earlier_config = load_config(run_dir, named)
        if checkpoint is not None:
            _check_is_newest(run_dir, checkpoint, named)
        if any(key.partition(".")[0] not in composed for key in overridden):  # an experiment may set any key
            overridden = [*composed, *overridden]
        return merge_resume_config(composed, overridden, run_dir, earlier_config)
    composed = _take_model_of_run(composed, overridden)
    new = validate(RunConfig, composed | {"resume": None})
    if composed.get("resume") is None or (newest := newest_run(new.name)) is None:
        return new
    earlier = load_config(newest)
    if not new.force_resume and (changes := identity_changes(new, earlier)):
        raise UserError(
            f"{', '.join(changes)} cannot change when a run is resumed, but resume=auto selects {newest}, the newest run "
            f"with name={new.name}. Give different runs different names, such as name={new.name}_$SLURM_ARRAY_TASK_ID in "
            "a job array, or remove resume=auto to start a new run."
        )
    return resume_as(new, newest, earlier)


def _take_model_of_run(values: dict[str, Any], overridden: Sequence[str]) -> dict[str, Any]:
    """Returns the configuration with the model and tokenizer of the run that ``init_from`` names, if any.

    Keys that the command line sets are kept, and so is a model that it selects.

    Raises:
        UserError: The configuration of the run cannot be read, or a component or a path in it is not trusted.
    """
    run_dir, _ = split_checkpoint(Path(str(values.get("init_from") or "")).expanduser())
    is_selected = any(key == "model" or key.partition(".")[0] not in {*values, "debug"} for key in overridden)
    if values.get("init_from") is None or is_selected or not (run_dir / CONFIG).is_file():
        return values
    run = load_config(run_dir, f"init_from={values['init_from']}")
    taken = run.model_dump(mode="json", include={"model", "tokenizer"})
    if any(key.partition(".")[0] == "tokenizer" for key in overridden):
        del taken["tokenizer"]
    check_trusted(taken, run_dir)
    check_locations(run, run_dir, used=tuple(taken), given=values)
    for key in ("model.vocab_size", *(key for key in overridden if key.startswith("model."))):
        _copy_key(key.split("."), values, taken)  # the vocabulary size is that of the tokenizer
    return values | taken


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
        _copy_key(key.split("."), now, earlier)
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


def _check_is_newest(run_dir: Path, checkpoint: Path, named: str) -> None:
    """Checks that a checkpoint to resume is the newest intact one, since a resume would discard the steps after it.

    Not checked in a requeued SLURM job, which has saved newer ones before.

    Raises:
        UserError: The checkpoint does not exist, is damaged or is not the newest one.
    """
    check_is_saved(checkpoint, named)
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 or (newest := newest_checkpoint(run_dir)) == checkpoint:
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
    keys = sorted(overridden, key=lambda key: key.count("."))  # groups first
    for key in keys:
        if key in COMPONENT_GROUPS:
            changed[key] = _select_components(values[key], earlier[key], key, keys)
        elif key.partition(".")[0] in values:
            _copy_key(key.split("."), values, changed)
    if "trainer" in keys and "trainer.precision" not in keys:
        changed["trainer"]["precision"] = earlier["trainer"]["precision"]  # a trainer option selects devices only
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


def resolve_split(config: RunConfig) -> RunConfig:
    """Resolves ``data.val_split=auto`` for a new run; a resumed run keeps its split."""
    return config.model_copy(update={"data": resolve_val_split(config.data)})


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
    if earlier_config.data.end_at_cut and not config.data.end_at_cut:
        keys.discard("data.end_at_cut")  # runs of earlier versions keep it
    if not config.train.past_batches:
        keys.discard("train.past_batches")  # set by a forced resume
    return sorted(key for key in keys if get_value(values, key) != get_value(earlier, key))


def _changed_starts(config: RunConfig, earlier_config: RunConfig) -> list[str]:
    """Returns the keys of the start of a run that differ from an earlier run's."""
    config = config.with_absolute_paths()
    return [key for key in START_KEYS if getattr(config, key) != getattr(earlier_config, key)]


def resolve_to_dict(values: DictConfig) -> dict[str, Any]:
    """Resolves a composed configuration to plain data, without ``trust`` and ``trust_paths``, which take effect.

    It is what the user typed and has in configuration directories, so the packages of its components are trusted, as
    are those of ``trust``.

    Raises:
        UserError: A mandatory value is missing, or ``trust_paths`` is invalid.
    """
    try:
        container = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{key} is missing. Set it on the command line: {key}=<value>") from None
    assert isinstance(container, dict)  # noqa: S101
    resolved = {str(key): value for key, value in container.items()}
    trust_paths(resolved.pop(TRUST_PATHS_KEY, None))
    named = resolved.pop(TRUST_KEY, None) or []
    trust_packages([named] if isinstance(named, str) else named)
    trust_components(resolved)
    return resolved


def replace_built_ins(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Removes the values of a built-in option from a node to which the command line adds ``_target_``.

    Args:
        values: Composed configuration.
        overrides: Overrides of the command line, whose values are kept. The optimizer also keeps ``lr``.
    """
    replaced = dict(values)
    for group in ("optimizer", "schedule", "tokenizer"):
        node = values.get(group)
        if isinstance(node, dict) and is_component(node) and "name" in node:
            kept = {TARGET, *_set_keys(group, overrides), *(("lr",) if group == "optimizer" else ())}
            replaced[group] = {key: value for key, value in node.items() if key in kept}
    return replaced


def _set_keys(group: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yields the keys of a group that overrides set."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if key == group and isinstance(value, dict):
            yield from map(str, value)
        elif key.startswith(f"{group}."):
            yield key.removeprefix(f"{group}.").partition(".")[0]


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


def _copy_key(path: list[str], source: dict[str, Any], target: dict[str, Any]) -> None:
    """Copies a value, or its whole group if the source or the target does not have that group."""
    for part in path[:-1]:
        if not isinstance(target.get(part), dict) or not isinstance(source.get(part), dict):
            target[part] = source.get(part)
            return
        source, target = source[part], target[part]
    if path[-1] in source:
        target[path[-1]] = source[path[-1]]
    else:
        target.pop(path[-1], None)
