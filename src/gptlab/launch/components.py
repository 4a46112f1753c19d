"""Checks the components of a run against their interfaces, and builds its callbacks and loggers.

Nothing is imported for a run without components.
"""

from collections.abc import Mapping
from inspect import isfunction, signature
from pathlib import Path
from typing import Any

from gptlab.config.components import (
    TARGET,
    build_component,
    check_arguments,
    check_component,
    import_target,
)
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.training.config import ComponentOptimizerConfig, ComponentScheduleConfig


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
        if issubclass(check_component(f"callbacks.{name}", values, Callback), Checkpoint):
            raise UserError(
                f"callbacks.{name}.{TARGET}={values[TARGET]}: gptlab writes the checkpoints of a run. Set "
                "the keys of callbacks.checkpoint."
            )
    for name, values in loggers.items():
        check_component(f"logger.{name}", values, Logger)
    if isinstance(config.optimizer, ComponentOptimizerConfig):
        _check_optimizer(config.optimizer)
    if isinstance(config.schedule, ComponentScheduleConfig):
        _check_schedule(config.schedule)
    check_arguments("trainer.flags", Trainer, config.trainer.flags, is_partial=True)


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
        known = signature(import_target("logger", values[TARGET])).parameters
        given = {"save_dir": str(directory)} if "save_dir" in known and "save_dir" not in values else {}
        logger = build_component(values, **given)
        logger.log_hyperparams(config.model_dump(mode="json"))
        loggers.append(logger)
    return loggers


def count_optimizer_state(config: RunConfig) -> int | None:
    """Counts the numbers in the state of an optimizer that is a component, after a step on the meta device.

    Returns:
        The count over all parameters, without scalars; None if the optimizer cannot step on the meta device.
    """
    import torch

    from gptlab.model.modern import meta_gpt
    from gptlab.training.optim.optimizers import build_optimizer

    model = meta_gpt(config.model)
    try:
        optimizer = build_optimizer(model, config.optimizer, fused=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception:  # whatever a user's optimizer raises without data
        return None
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor) and value.dim() > 0)


def _check_optimizer(config: ComponentOptimizerConfig) -> None:
    """Checks an optimizer that is a component, and the function of its parameter groups."""
    from torch.optim import Optimizer

    from gptlab.training.optim.optimizers import optimizer_component

    target = import_target("optimizer", config.name)
    check_component("optimizer", optimizer_component(config), Optimizer, handed=[*signature(target).parameters][:1])
    if config.param_groups is not None:
        groups = import_target("optimizer.param_groups", config.param_groups[TARGET])
        handed = [*signature(groups).parameters][:1]
        check_component("optimizer.param_groups", config.param_groups, handed=handed)


def _check_schedule(config: ComponentScheduleConfig) -> None:
    """Checks a schedule that is a component: a function with the arguments ``step``, ``lr`` and ``max_steps``."""
    handed = ("step", "lr", "max_steps")
    function = import_target("schedule", config.name)
    if not isfunction(function) or not set(handed) <= set(signature(function).parameters):
        raise UserError(
            f"schedule.{TARGET}={config.name} is not a function f(step, *, lr, max_steps) of the learning rate."
        )
    check_component("schedule", config.model_dump(mode="json", exclude={"max_steps"}), handed=handed)


def _components(extra: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Returns the enabled components among the additional keys of a group."""
    return {name: values for name, values in (extra or {}).items() if values is not None}
