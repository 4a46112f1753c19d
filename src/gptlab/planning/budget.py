"""What to train with so much compute: size, tokens, batch and learning rate. Imports no torch."""

import math
from typing import Any, NamedTuple

from gptlab.config.base import validate
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.model.config import GPTConfig, flops_per_token, parameter_count
from gptlab.training.config import AdamWConfig

TOKENS_PER_PARAMETER = 20  # compute-optimal, about (Hoffmann et al. 2022, Chinchilla, section 3.4 and table A3)
HEAD_SIZE = 64  # width of a head, in all of GPT-2's sizes
MAX_HEADS = 64  # of the largest that is proposed
MIN_STEPS = 100
MAX_RATIO = 3.0  # how far from 20 tokens a parameter a proposal may be
WARMUP_FRACTION = 0.01  # of the steps, for budgets of a few of them


class ComputeOptimalChoice(NamedTuple):
    """A run that is compute-optimal for a budget.

    Attributes:
        config: The run's configuration.
        overrides: Overrides that turn the given configuration into it.
        tokens_per_parameter: Training tokens per parameter.
    """

    config: RunConfig
    overrides: list[str]
    tokens_per_parameter: float


def choose_compute_optimal(config: RunConfig, budget: float, devices: int) -> ComputeOptimalChoice:
    """Chooses a run for a budget of FLOPs, forward and backward.

    Size and tokens: about 20 tokens a parameter (Hoffmann et al. 2022). Batch and learning rate: functions of the
    budget (Bi et al. 2024, DeepSeek LLM, section 3.1), found with AdamW; another optimizer keeps its own rates.

    Args:
        config: The configuration, with the vocabulary; only size, length, batch and learning rate change.
        budget: FLOPs.
        devices: Ranks that read data of their own, which the batch must be divisible by.

    Raises:
        UserError: No model of the ladder, or no sensible number of steps, fits the budget.
    """
    model = min(model_ladder(config.model), key=lambda size: abs(math.log(_ratio(size, budget) / TOKENS_PER_PARAMETER)))
    if (ratio := _ratio(model, budget)) < TOKENS_PER_PARAMETER / MAX_RATIO:
        raise _too_small(budget, budget * TOKENS_PER_PARAMETER / MAX_RATIO / ratio)
    if ratio > TOKENS_PER_PARAMETER * MAX_RATIO:
        most = budget * TOKENS_PER_PARAMETER * MAX_RATIO / ratio
        raise UserError(
            f"budget={budget:.3g} FLOPs is too large: the largest model of the ladder has "
            f"{parameter_count(model):,} parameters, for at most {most:.1g}."
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
    """Returns shapes between and around GPT-2's: as many blocks as heads of 64 up to 12, then three more per head.

    So 12 heads have 12 blocks, 16 have 24, 20 have 36 (Radford et al. 2019, table 2); its largest, 25 and 48, nearly.
    """
    found = []
    for heads in range(1, MAX_HEADS + 1):
        layers = heads if heads <= 12 else 12 + 3 * (heads - 12)
        if 2 * model.value_embeddings <= layers:
            shape = {"n_layer": layers, "n_head": heads, "n_embd": HEAD_SIZE * heads}
            found.append(model.model_copy(update=shape))
    return found


def optimal_batch_tokens(budget: float) -> float:
    """Returns the tokens of a step (Bi et al. 2024, DeepSeek LLM, section 3.1, equation 1)."""
    return 0.2920 * budget**0.3271


def optimal_learning_rate(budget: float) -> float:
    """Returns AdamW's learning rate (Bi et al. 2024, DeepSeek LLM, section 3.1, equation 1)."""
    return 0.3118 * budget**-0.1250


def _ratio(model: GPTConfig, budget: float) -> float:
    """Returns the tokens per parameter that a budget allows a model."""
    return budget / flops_per_token(model) / parameter_count(model)


def _round_batch(batch: float, devices: int) -> int:
    """Rounds a batch to one that is divisible by the devices, and if it is large, by 8 times as many."""
    parts = devices * 8 if batch >= 32 * devices else devices
    return max(1, round(batch / parts)) * parts


def _values(config: RunConfig, model: GPTConfig, steps: int, batch: int, budget: float) -> dict[str, Any]:
    """Returns the values that change, by config key."""
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
    """Applies values to a configuration, and validates it again."""
    whole = config.model_dump(mode="json")
    for key, value in values.items():
        group, _, name = key.partition(".")
        whole[group][name] = value
    return validate(RunConfig, whole)


def _format_value(value: Any) -> str:
    return "null" if value is None else str(value).replace(" ", "")


def _too_small(budget: float, least: float) -> UserError:
    return UserError(f"budget={budget:.3g} FLOPs is too small for any model of the ladder: at least {least:.1g}.")
