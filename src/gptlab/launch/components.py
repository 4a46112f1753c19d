"""Builds components: imports their targets, checks interfaces and arguments, and instantiates them.

Nothing is imported for a run without components. Components of this run are trusted (``gptlab.config.components``).
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from gptlab.config.components import TARGET, is_component
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError, did_you_mean
from gptlab.training.config import ComponentOptimizerConfig, ComponentScheduleConfig, OptimizerConfig

if TYPE_CHECKING:
    from gptlab.training.optim.optimizers import OptimizerComponents

HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")  # of hydra.utils.instantiate


def check_components(config: RunConfig) -> None:
    """Imports the targets of all components and checks their interfaces and arguments.

    Raises:
        UserError: A target cannot be imported, is not of the interface of its node, or does not have an argument.
    """
    callbacks, loggers = _components(config.callbacks.model_extra), _components(config.logger.model_extra)
    groups = (config.optimizer, config.schedule)
    parts = [isinstance(part, ComponentOptimizerConfig | ComponentScheduleConfig) for part in groups]
    if not any((callbacks, loggers, config.trainer.flags, *parts)):
        return
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback, Checkpoint
    from lightning.pytorch.loggers import Logger

    for name, values in callbacks.items():
        check_component(f"callbacks.{name}", values, Callback)
        if issubclass(pkgutil.resolve_name(values[TARGET]), Checkpoint):
            raise UserError(
                f"callbacks.{name}.{TARGET}={values[TARGET]}: gptlab writes the checkpoints of a run. Set "
                "the keys of callbacks.checkpoint."
            )
    for name, values in loggers.items():
        check_component(f"logger.{name}", values, Logger, handed=("save_dir",))
    if isinstance(config.optimizer, ComponentOptimizerConfig):
        _check_optimizer(config.optimizer)
    if isinstance(config.schedule, ComponentScheduleConfig):
        _check_schedule(config.schedule)
    _check_arguments("trainer.flags", Trainer, config.trainer.flags, (), is_partial=True)


def build_callbacks(config: RunConfig) -> list[Any]:
    """Builds the Lightning callbacks among the components, in the order of the configuration."""
    return [build_component(values) for values in _components(config.callbacks.model_extra).values()]


def build_component_loggers(config: RunConfig, directory: Path) -> list[Any]:
    """Builds the Lightning loggers among the components; each has the run's configuration as hyperparameters.

    Args:
        config: Configuration of the run.
        directory: Run directory, which is ``save_dir`` of a logger that has this argument, unless it is set.
    """
    loggers = []
    for values in _components(config.logger.model_extra).values():
        known = inspect.signature(pkgutil.resolve_name(values[TARGET])).parameters
        given = {"save_dir": str(directory)} if "save_dir" in known and "save_dir" not in values else {}
        logger = build_component(values, **given)
        logger.log_hyperparams(config.model_dump(mode="json"))
        loggers.append(logger)
    return loggers


def build_optimizer_components(config: OptimizerConfig) -> "OptimizerComponents | None":
    """Builds the functions of an optimizer that is a component; None for a built-in optimizer."""
    from gptlab.training.optim.optimizers import OptimizerComponents

    if not isinstance(config, ComponentOptimizerConfig):
        return None
    values = config.model_dump(mode="json")
    split = values.pop("param_groups")
    known = inspect.signature(pkgutil.resolve_name(config.name)).parameters
    if values["weight_decay"] is None or "weight_decay" not in known:
        del values["weight_decay"]
    build = build_component(values | {"_partial_": True})
    return OptimizerComponents(build, split and build_component(split | {"_partial_": True}))


def count_optimizer_state(config: RunConfig) -> int | None:
    """Counts the numbers in the state of an optimizer that is a component, after a step on the meta device.

    Returns:
        The count over all parameters, without scalars; None if the optimizer cannot step on the meta device.
    """
    import torch

    from gptlab.model.modern import meta_gpt
    from gptlab.training.optim.optimizers import build_optimizer

    model = meta_gpt(config.model)
    components = build_optimizer_components(config.optimizer)
    try:
        optimizer = build_optimizer(model, config.optimizer, fused=False, components=components)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception:  # whatever a user's optimizer raises without data
        return None
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor) and value.dim() > 0)


def check_component(key: str, values: Mapping[str, Any], interface: type, handed: Iterable[str] = ()) -> None:
    """Checks that a component is a class of an interface and has the given arguments, without building it.

    Args:
        key: Dotted key of the component.
        values: The component.
        interface: Class of which the target must be a subclass.
        handed: Names of the arguments that gptlab passes.

    Raises:
        UserError: The target cannot be imported or is no such class, or an argument is unknown or missing.
    """
    target = _import_target(key, values[TARGET])
    if not (isinstance(target, type) and issubclass(target, interface)):
        raise UserError(
            f"{key}.{TARGET}={values[TARGET]} is not a subclass of {interface.__module__}.{interface.__qualname__}."
        )
    _check_node(key, target, values, handed)


def build_component(values: Mapping[str, Any], **handed: Any) -> Any:
    """Instantiates a component (``hydra.utils.instantiate``) with its own and the given arguments.

    Strings are taken literally: an interpolation in a stored configuration is not resolved.
    """
    return instantiate({"_convert_": "all"} | _escape(values), **handed)


def _check_optimizer(config: ComponentOptimizerConfig) -> None:
    """Checks an optimizer that is a component, and the function of its parameter groups."""
    from torch.optim import Optimizer

    values = config.model_dump(mode="json", exclude={"param_groups"}, exclude_none=True)
    known = inspect.signature(_import_target("optimizer", config.name)).parameters
    if "weight_decay" not in known:
        values.pop("weight_decay", None)  # it is in the parameter groups
    check_component("optimizer", values, Optimizer, handed=list(known)[:1])
    if config.param_groups is not None:
        function = _import_target("optimizer.param_groups", config.param_groups[TARGET])
        _check_node("optimizer.param_groups", function, config.param_groups | {"_partial_": True}, ())


def _check_schedule(config: ComponentScheduleConfig) -> None:
    """Checks a schedule that is a component: a function with the arguments ``step``, ``lr`` and ``max_steps``."""
    function = _import_target("schedule", config.name)
    if not inspect.isfunction(function) or not {"step", "lr", "max_steps"} <= set(
        inspect.signature(function).parameters
    ):
        raise UserError(
            f"schedule.{TARGET}={config.name} is not a function f(step, *, lr, max_steps) of the learning rate."
        )
    _check_node("schedule", function, config.model_dump(mode="json"), ("step", "lr", "max_steps"))


def _components(extra: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Returns the enabled components among the additional keys of a group."""
    return {name: values for name, values in (extra or {}).items() if values is not None}


def _import_target(key: str, path: str) -> Any:
    """Imports the target of a component."""
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # whatever a user's module raises when it is imported
        raise UserError(
            f"{key}.{TARGET}={path} cannot be imported: {type(error).__name__}: {error}. Modules are searched in the "
            f"working directory ({Path.cwd()}), PYTHONPATH and the installed packages."
        ) from error


def _check_node(key: str, target: Callable[..., Any], values: Mapping[str, Any], handed: Iterable[str]) -> None:
    """Checks the arguments of a target, and the components among them."""
    arguments = {name: value for name, value in values.items() if name not in HYDRA_KEYS}
    is_partial = bool(values.get("_partial_")) or "_args_" in values
    _check_arguments(key, target, arguments, handed, is_partial=is_partial)
    for name, value in arguments.items():
        for number, element in enumerate(value) if isinstance(value, list) else ((None, value),):
            if is_component(element):
                inner = f"{key}.{name}" if number is None else f"{key}.{name}.{number}"
                _check_node(inner, _import_target(inner, element[TARGET]), element, ())


def _check_arguments(
    key: str, target: Callable[..., Any], arguments: Mapping[str, Any], handed: Iterable[str], *, is_partial: bool
) -> None:
    """Checks that a callable has all given arguments and, unless it is partial, that no required one is missing."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some built-in classes have no signature
        return
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    title = getattr(target, "__qualname__", str(target))
    for name in arguments:
        if name not in named and not takes_any:
            nearest = did_you_mean(name, sorted(named))
            raise UserError(f"Unknown argument {key}.{name}: {title} has no such argument.{nearest}")
    missing = [
        name for name, p in named.items() if p.default is p.empty and name not in arguments and name not in handed
    ]
    if missing and not is_partial:
        raise UserError(f"{key}.{missing[0]} is missing: it is a required argument of {title}.")


def _escape(value: Any) -> Any:
    """Escapes interpolations in all strings of nested plain data."""
    if isinstance(value, Mapping):
        return {key: _escape(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(element) for element in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value
