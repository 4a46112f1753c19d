"""Resolves the configuration of a command or a run from what Hydra has composed. Imports no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gptlab.config.base import copy_key, get_value, validate
from gptlab.config.components import TARGET, is_component
from gptlab.config.locations import TRUST_PATHS_KEY, check_locations, trust_paths
from gptlab.config.resume import (
    COMPONENT_GROUPS,
    check_is_newest,
    identity_changes,
    merge_resume_config,
    resume_as,
)
from gptlab.config.schema import RunConfig
from gptlab.config.trust import TRUST_KEY, check_trusted, trust_components, trust_packages
from gptlab.data.prepare.splitting import resolve_val_split
from gptlab.errors import UserError
from gptlab.tracking.run_directory import load_config, newest_run, split_checkpoint
from gptlab.tracking.run_store.runs import CONFIG, Run
from gptlab.training.hardware import list_gpus, resolve_padding

AUTO = "auto"
_MISSING = object()  # get_value returns it for a key that does not exist


def resolve_to_dict(values: DictConfig) -> dict[str, Any]:
    """Resolves a composed configuration to plain data, without ``trust`` and ``trust_paths``, which take effect.

    It is what the user typed and has in configuration directories, so the packages of its components are trusted, as
    are those of ``trust``.

    Raises:
        UserError: A mandatory value is missing, or ``trust`` or ``trust_paths`` is invalid.
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
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{TRUST_KEY}={named} is not a list of packages, as in {TRUST_KEY}=[my_package].")
    trust_packages(names)
    trust_components(resolved)
    return resolved


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
    _check_without(values, overrides)
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
            check_is_newest(run_dir, checkpoint, named)
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
            f"{', '.join(changes)} cannot change when a run is resumed, but resume=auto selects {newest}, the newest "
            f"run with name={new.name}. Give different runs different names, such as "
            f"name={new.name}_$SLURM_ARRAY_TASK_ID in a job array, or remove resume=auto to start a new run."
        )
    return resume_as(new, newest, earlier)


def _check_without(values: DictConfig, overrides: Sequence[str]) -> None:
    """Raises UserError if an option of the group ``without`` changes nothing, since the recipe has no such part."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    chosen = next((override for override in reversed(parsed) if override.key_or_group == "without"), None)
    if chosen is None or chosen.is_delete() or not GlobalHydra.instance().is_initialized():
        return
    others = [override.input_line for override in parsed if override.key_or_group != "without"]
    value: Any = chosen.value()
    names = value if isinstance(value, list) else [value]
    for name in names:
        rest = ",".join(other for other in names if other != name)
        without_it = compose("train", overrides=[*map(str, others), *([f"without=[{rest}]"] if rest else [])])
        if name != "nothing" and without_it == values:
            raise UserError(f"without={name} changes nothing: the selected options do not have this part.")


def resolve_split(config: RunConfig) -> RunConfig:
    """Resolves ``data.val_split=auto`` for a new run; a resumed run keeps its split."""
    return config.model_copy(update={"data": resolve_val_split(config.data)})


def resolve_model(config: RunConfig, trained: RunConfig | None) -> RunConfig:
    """Resolves ``model.pad_vocab_to_multiple_of=auto`` for a new run; a resumed run keeps its number of rows.

    Args:
        config: Configuration of the run.
        trained: Configuration of the run whose weights ``init_from`` loads, which determine the number of rows.
    """
    accelerator, model = config.trainer.accelerator, config.model
    if model.pad_vocab_to_multiple_of == "auto" and trained is not None:
        model = model.model_copy(update={"pad_vocab_to_multiple_of": trained.model.pad_vocab_to_multiple_of})

    def is_on_gpu() -> bool:
        if config.resume_from_nanogpt is not None:
            return False
        return accelerator == "gpu" or (accelerator == "auto" and bool(list_gpus()))

    return config.model_copy(update={"model": resolve_padding(model, is_on_gpu)})


def add_keys_of_run(overrides: Sequence[str]) -> list[str]:
    """Makes keys of the run that ``resume=<run directory>`` names valid on the command line.

    Hydra composes the default options, which do not have the keys of the run's own options, such as
    ``logger.wandb.mode``. ``key=value`` becomes ``++key=value``, and ``~callbacks.<name>`` becomes
    ``++callbacks.<name>=null``.

    Args:
        overrides: Overrides of the command line.

    Returns:
        The overrides; unchanged without ``resume=<run directory>``.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:  # Hydra reports it
        return list(overrides)
    named = next((override.value() for override in reversed(parsed) if override.key_or_group == "resume"), None)
    if named in (None, AUTO):
        return list(overrides)
    run_dir, _ = split_checkpoint(Path(str(named)).expanduser().absolute())
    try:
        earlier = Run(run_dir).config
    except UserError:  # ``resolve`` reports it
        return list(overrides)
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
        copy_key(key.split("."), values, taken)  # the vocabulary size is that of the tokenizer
    return values | taken


def _set_keys(group: str, overrides: Sequence[str]) -> Iterator[str]:
    """Yields the keys of a group that overrides set."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if key == group and isinstance(value, dict):
            yield from map(str, value)
        elif key.startswith(f"{group}."):
            yield key.removeprefix(f"{group}.").partition(".")[0]
