"""Checks the components of a run against their interfaces, and builds its callbacks and loggers.

Nothing is imported for a run without components.
"""

import contextlib
import math
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from inspect import isclass, isfunction, signature
from pathlib import Path
from typing import Any

from gptlab.config.components import (
    TARGET,
    bind_component,
    build_component,
    check_arguments,
    check_component,
    component_arguments,
    import_target,
)
from gptlab.config.schema import RunConfig
from gptlab.data.config import ComponentTokenizerConfig
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.data.sources.component import check_reader
from gptlab.data.tokenizers.component import check_tokenizer
from gptlab.errors import UserError, first_line, without_passwords
from gptlab.model.config import ComponentModelConfig, GPTConfig, ParameterCounts
from gptlab.training.config import ComponentOptimizerConfig, ComponentScheduleConfig
from gptlab.training.optim.schedules import learning_rate


def check_components(config: RunConfig) -> None:
    """Imports the targets of all components and checks their interfaces and arguments.

    Raises:
        UserError: A target cannot be imported, is not of the interface of its node, or an argument is invalid.
    """
    callbacks, loggers = config.callbacks.components, config.logger.components
    if callbacks or loggers or config.trainer.flags:
        _check_lightning(callbacks, loggers, config.trainer.flags)
    if config.data.reader is not None:
        check_reader(config.data.reader)
    if isinstance(config.tokenizer, ComponentTokenizerConfig):
        check_tokenizer(config.tokenizer.component)
    if config.model.components:
        _check_model(config.model)
    if config.loss is not None:
        _check_loss(config.loss)
    if isinstance(config.optimizer, ComponentOptimizerConfig):
        _check_optimizer(config.optimizer)
    if isinstance(config.schedule, ComponentScheduleConfig):
        _check_schedule(config.schedule)


def try_components(config: RunConfig) -> None:
    """Builds the model, loss, optimizer and schedule that are components, and calls each once, without data.

    Args:
        config: Checked configuration with the vocabulary size.

    Raises:
        UserError: A component raises an error, or returns something else than it should.
    """
    optimizer, schedule = config.optimizer, config.schedule
    if isinstance(schedule, ComponentScheduleConfig):
        with _failure_of(f"schedule.{TARGET}={schedule.name}"):
            learning_rates = [learning_rate(s, schedule, lr=1.0, max_steps=config.steps) for s in (0, config.steps - 1)]
            if not all(map(math.isfinite, learning_rates)):
                raise ValueError(f"it returns {learning_rates} for the first and the last step")
    model = None
    if config.model.components:
        names = " and ".join(f"{key}={target}" for key, target in _model_targets(config.model))
        with _failure_of(names):
            model = _try_model(config.model)
    if config.loss is not None:
        with _failure_of(f"loss.{TARGET}={config.loss[TARGET]}"):
            _try_loss(config.loss, config.model)
    if isinstance(optimizer, ComponentOptimizerConfig):
        from gptlab.model.modern import meta_gpt

        with _failure_of(f"optimizer.{TARGET}={optimizer.name}"):
            _try_optimizer(optimizer, meta_gpt(config.model) if model is None else model)


@contextlib.contextmanager
def _failure_of(name: str) -> Iterator[None]:
    """Converts an exception of a user's component to a UserError, with the line that raised it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{name} fails: {type(error).__name__}: {first_line(error)} ({Path(frame.filename).name}, line "
            f"{frame.lineno})"
        ) from error


def _model_targets(config: GPTConfig) -> Iterator[tuple[str, str]]:
    """Yields the keys and targets of a model and its parts that are components."""
    for name, values in config.components.items():
        yield (f"model.{name}.{TARGET}" if name else f"model.{TARGET}"), values[TARGET]


def _try_model(config: GPTConfig) -> Any:
    """Builds a model on the meta device, checks the shape of its logits if it can run there, and returns it."""
    import torch

    from gptlab.model.modern import meta_gpt

    model = meta_gpt(config).eval()
    length = min(2, config.block_size)
    try:
        with torch.no_grad():
            shape = tuple(model(torch.zeros((1, length), dtype=torch.long, device="meta")).shape)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
            return model  # an operator has no implementation for the meta device
        raise
    if shape != (1, length, config.known_vocab_size):
        raise ValueError(f"its logits have the shape {shape} instead of {(1, length, config.known_vocab_size)}")
    return model


def _try_loss(values: Mapping[str, Any], config: GPTConfig) -> None:
    """Calls a loss function with four tokens, one of which is not scored."""
    import torch

    from gptlab.model.loss import IGNORED, LogitSettings, custom_loss

    x, weight = torch.ones(4, config.n_embd), torch.zeros(config.known_vocab_size, config.n_embd)
    targets = torch.tensor([0, 0, IGNORED, 0])
    loss = custom_loss(bind_component(values), x, weight, targets, LogitSettings(config.known_vocab_size, None))
    if not isinstance(loss, torch.Tensor) or loss.dim() > 0:
        raise ValueError(f"it returns {type(loss).__name__} instead of a tensor without dimensions")


def _try_optimizer(config: ComponentOptimizerConfig, model: Any) -> None:
    """Builds an optimizer for a model on the meta device."""
    from gptlab.training.optim.optimizers import build_optimizer

    build_optimizer(model, config, fused=False)


def preflight_components(config: RunConfig, prepared: TokenDataset) -> None:
    """Calls ``preflight(config, prepared, **arguments)`` of callbacks and loggers whose class has this class method.

    Args:
        config: Checked configuration.
        prepared: Data of the run.

    Raises:
        UserError: A component cannot be used with this configuration or data.
    """
    for group in ("callbacks", "logger"):
        for name, values in getattr(config, group).components.items():
            target = import_target(f"{group}.{name}", values[TARGET])
            if check := getattr(target, "preflight", None):
                check(config, prepared, **component_arguments(values))


def build_callbacks(config: RunConfig) -> list[Any]:
    """Builds the Lightning callbacks among the components, in the order of the configuration."""
    return [build_component(values) for values in config.callbacks.components.values()]


def build_component_loggers(config: RunConfig, directory: Path) -> list[Any]:
    """Builds the Lightning loggers among the components; each has the run's configuration as hyperparameters.

    Args:
        config: Configuration of the run, whose name is ``name`` of a logger that has this argument.
        directory: Run directory, which is ``save_dir`` of a logger that has this argument.
    """
    loggers = []
    for values in config.logger.components.values():
        logger = build_component(values, save_dir=str(directory), name=config.name)
        logger.log_hyperparams(without_passwords(config.model_dump(mode="json")))
        loggers.append(logger)
    return loggers


def count_components(config: RunConfig) -> RunConfig:
    """Counts the parameters and the optimizer state of components, on the meta device, for forecasts.

    Args:
        config: Checked configuration with the vocabulary size.

    Returns:
        A copy with ``model.counts`` and ``optimizer.state_size``, if these are components.
    """
    if not config.model.components and not isinstance(config.optimizer, ComponentOptimizerConfig):
        return config
    from torch import nn

    from gptlab.model.modern import meta_gpt

    model: nn.Module = meta_gpt(config.model)
    update: dict[str, Any] = {}
    if config.model.components:
        update["model"] = config.model.with_counts(_count_parameters(model))
    if isinstance(config.optimizer, ComponentOptimizerConfig):
        update["optimizer"] = config.optimizer.with_state_size(_count_state(model, config.optimizer))
    return config.model_copy(update=update)


def _count_parameters(model: Any) -> ParameterCounts:
    """Counts the parameters of a model by its top-level modules."""
    parts: dict[str, int] = {}
    matrices = 0
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
        matrices += parameter.numel() if part == "h" and parameter.dim() == 2 else 0
    return ParameterCounts(parts, matrices)


def _count_state(model: Any, config: ComponentOptimizerConfig) -> int | None:
    """Counts the elements of the optimizer state after one step, without scalars.

    The step is on the meta device. If the optimizer cannot do that, it makes a step with one CPU tensor of each shape.

    Args:
        model: The model, on the meta device.
        config: Configuration of the optimizer.

    Returns:
        The count, or None if the optimizer raises an error without a model's data.
    """
    times = Counter(parameter.shape for parameter in model.parameters() if parameter.requires_grad)
    for device in ("meta", "cpu"):
        with contextlib.suppress(Exception):  # whatever a user's optimizer raises
            sizes = _state_sizes(config, list(times), device)
            return sum(count * size for count, size in zip(times.values(), sizes, strict=True))
    return None


def _state_sizes(config: ComponentOptimizerConfig, shapes: list[Any], device: str) -> list[int]:
    """Returns the number of elements of the optimizer state of a parameter of each shape, after one step."""
    import torch
    from torch import nn

    from gptlab.training.optim.optimizers import optimizer_component

    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer = bind_component(optimizer_component(config))([{"params": parameters}])
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = (optimizer.state[parameter].values() for parameter in parameters)
    return [sum(part.numel() for part in state if isinstance(part, torch.Tensor) and part.dim()) for state in states]


def _check_lightning(
    callbacks: Mapping[str, Mapping[str, Any]], loggers: Mapping[str, Mapping[str, Any]], flags: Mapping[str, Any]
) -> None:
    """Checks callbacks, loggers, and arguments of the Trainer."""
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
        known = signature(import_target(f"logger.{name}", values[TARGET])).parameters
        given = {key: "" for key in ("save_dir", "name") if key in known}
        check_component(f"logger.{name}", given | dict(values), Logger)
    check_arguments("trainer.flags", Trainer, flags, is_partial=True)


def _check_model(config: GPTConfig) -> None:
    """Checks a model that is a component, and the parts of a model that are components."""
    from gptlab.model.modern import check_model, check_part

    if isinstance(config, ComponentModelConfig):
        check_model(config)
    for name in config.components:
        if name:
            check_part(config, name)


def _check_loss(values: Mapping[str, Any]) -> None:
    """Checks a loss function: f(logits, targets) or f(states, weight, targets)."""
    target = import_target("loss", values[TARGET])
    known = list(signature(target).parameters) if callable(target) else []
    handed = known[: 3 if known[:1] == ["states"] else 2]
    if isclass(target) or len(handed) < 2:
        raise UserError(
            f"loss.{TARGET}={values[TARGET]} is not a function f(logits, targets, ...) or f(states, weight, targets, "
            "...) of the training loss."
        )
    check_component("loss", values, handed=handed)


def _check_optimizer(config: ComponentOptimizerConfig) -> None:
    """Checks an optimizer that is a component, and the function of its parameter groups."""
    from torch.optim import Optimizer

    from gptlab.training.optim.optimizers import optimizer_component

    target = import_target("optimizer", config.name)
    handed = [*signature(target).parameters][:1] if callable(target) else []
    check_component("optimizer", optimizer_component(config), Optimizer, handed=handed)
    if config.param_groups is not None:
        groups = import_target("optimizer.param_groups", config.param_groups[TARGET])
        handed = [*signature(groups).parameters][:1] if callable(groups) else []
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
