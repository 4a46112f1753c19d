"""Compute-optimal runs: model size, tokens, batch size and learning rate for a budget of FLOPs. Imports no torch."""

import math
from typing import Any, NamedTuple

from gptlab.config.base import validate
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.model.config import GPTConfig, flops_per_token, parameter_count
from gptlab.training.config import AdamWConfig

TOKENS_PER_PARAMETER = 20  # approximately compute-optimal (Hoffmann et al. 2022, Chinchilla, section 3.4 and table A3)
HEAD_SIZE = 64  # head size of all GPT-2 models
MAX_HEADS = 64  # of the largest model of the ladder
MIN_STEPS = 100
MAX_RATIO = 3.0  # largest factor between the tokens per parameter of a choice and 20
WARMUP_FRACTION = 0.01  # of the steps, for runs shorter than ten times the configured warm-up


class ComputeOptimalChoice(NamedTuple):
    """Run that is compute-optimal for a budget.

    Attributes:
        config: Configuration of the run.
        overrides: Overrides that change the given configuration to it.
        tokens_per_parameter: Training tokens per parameter.
    """

    config: RunConfig
    overrides: list[str]
    tokens_per_parameter: float


def choose_compute_optimal(config: RunConfig, budget: float, devices: int) -> ComputeOptimalChoice:
    """Chooses a run for a budget of FLOPs (forward and backward).

    The model is trained on about 20 tokens per parameter (Hoffmann et al. 2022). Global batch size and learning rate
    are functions of the budget (Bi et al. 2024, DeepSeek LLM, section 3.1). These were fitted with AdamW, so the
    learning rates of other optimizers are not changed.

    Args:
        config: Configuration with the vocabulary size. Model size, length, batch size and learning rate change.
        budget: FLOPs of the training run, forward and backward.
        devices: Number of data-parallel ranks. The global batch size is a multiple of it.

    Raises:
        UserError: The budget is too small or too large for the models of ``model_ladder``.
    """
    model = min(model_ladder(config.model), key=lambda size: abs(math.log(_ratio(size, budget) / TOKENS_PER_PARAMETER)))
    if (ratio := _ratio(model, budget)) < TOKENS_PER_PARAMETER / MAX_RATIO:
        raise _too_small(budget, budget * TOKENS_PER_PARAMETER / MAX_RATIO / ratio)
    if ratio > TOKENS_PER_PARAMETER * MAX_RATIO:
        most = budget * TOKENS_PER_PARAMETER * MAX_RATIO / ratio
        raise UserError(
            f"budget={budget:.3g} FLOPs is too large: the largest available model has {parameter_count(model):,} "
            f"parameters, for a budget of at most {most:.1g} FLOPs."
        )
    per_sequence = flops_per_token(model) * model.block_size
    batch = _round_batch(optimal_batch_tokens(budget) / model.block_size, devices)
    if (steps := round(budget / per_sequence / batch)) < MIN_STEPS:
        batch = _round_batch(budget / per_sequence / MIN_STEPS, devices)
        steps = round(budget / per_sequence / batch)
    if steps < MIN_STEPS // 2:
        raise _too_small(budget, MIN_STEPS * per_sequence * devices)
    values = _values(config, model, steps, batch, budget)
    return ComputeOptimalChoice(
        _apply_values(config, values),
        [f"{key}={_format_value(value)}" for key, value in values.items()],
        steps * batch * model.block_size / parameter_count(model),
    )


def model_ladder(model: GPTConfig) -> list[GPTConfig]:
    """Returns model shapes that extend GPT-2's sizes: as many blocks as heads up to 12, then 3 more blocks per head.

    12 heads have 12 blocks, 16 have 24 and 20 have 36, as in GPT-2 (Radford et al. 2019, table 2). GPT-2 XL (25 heads,
    48 blocks) is close to a shape of the ladder (25 heads, 51 blocks). The head size is 64.
    """
    found = []
    for heads in range(1, MAX_HEADS + 1):
        layers = heads if heads <= 12 else 12 + 3 * (heads - 12)
        if 2 * model.value_embeddings <= layers:
            shape = {"n_layer": layers, "n_head": heads, "n_embd": HEAD_SIZE * heads}
            found.append(model.model_copy(update=shape))
    return found


def optimal_batch_tokens(budget: float) -> float:
    """Returns the global batch size in tokens for a budget of FLOPs (Bi et al. 2024, section 3.1, equation 1)."""
    return 0.2920 * budget**0.3271


def optimal_learning_rate(budget: float) -> float:
    """Returns the learning rate of AdamW for a budget of FLOPs (Bi et al. 2024, section 3.1, equation 1)."""
    return 0.3118 * budget**-0.1250


def _ratio(model: GPTConfig, budget: float) -> float:
    """Returns the tokens per parameter of a model that is trained with a budget."""
    return budget / flops_per_token(model) / parameter_count(model)


def _round_batch(batch: float, devices: int) -> int:
    """Rounds a batch size to a multiple of the devices or, if it is large, of 8 times the devices."""
    parts = devices * 8 if batch >= 32 * devices else devices
    return max(1, round(batch / parts)) * parts


def _values(config: RunConfig, model: GPTConfig, steps: int, batch: int, budget: float) -> dict[str, Any]:
    """Returns the changed values by config key."""
    values: dict[str, Any] = {f"model.{key}": getattr(model, key) for key in ("n_layer", "n_head", "n_embd")}
    values |= {"train.max_steps": steps, "train.global_batch_size": batch}
    if config.train.max_tokens is not None:
        values["train.max_tokens"] = None
    if config.train.batch_schedule:
        values["train.batch_schedule"] = []
    if config.train.micro_batch_size is not None:
        values["train.micro_batch_size"] = None
    if isinstance(config.optimizer, AdamWConfig):
        values["optimizer.lr"] = float(f"{optimal_learning_rate(budget):.2g}")
    if config.schedule.warmup_steps > steps // 10:
        values["schedule.warmup_steps"] = max(1, round(steps * WARMUP_FRACTION))
    return values


def _apply_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Returns the validated configuration with changed values."""
    whole = config.model_dump(mode="json")
    for key, value in values.items():
        group, _, name = key.partition(".")
        whole[group][name] = value
    return validate(RunConfig, whole)


def _format_value(value: Any) -> str:
    return "null" if value is None else str(value).replace(" ", "")


def _too_small(budget: float, least: float) -> UserError:
    return UserError(
        f"budget={budget:.3g} FLOPs is too small for any available model. It needs at least {least:.1g} FLOPs."
    )
