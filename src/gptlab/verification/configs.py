"""Configurations of the runs that a proof compares: the given configuration, shortened. Imports no torch."""

import math
from typing import Annotated, Any, Literal, Self, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from gptlab.config.base import FrozenConfig, validate
from gptlab.config.resolve import resolve, resolve_to_dict
from gptlab.config.schema import LoggerConfig, RunConfig
from gptlab.errors import UserError
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.config import (
    CallbacksConfig,
    CheckpointConfig,
    ComponentScheduleConfig,
    ConstantConfig,
    SamplesConfig,
    ScheduleConfig,
    TraceConfig,
    TrainConfig,
    WSDConfig,
)

S = TypeVar("S", bound=FrozenConfig)

EVAL_WINDOWS, SAMPLE_TOKENS = 8, 8  # short evaluations and samples
LONGER = 100  # additional steps of a run that will be killed, so that it does not finish first


class ProveConfig(FrozenConfig):
    """Config keys of a proof; see conf/prove.yaml."""

    steps: Annotated[int, Field(ge=2)]
    kill_after: PositiveInt
    ranks: Annotated[list[PositiveInt], Field(min_length=1)]
    workers: Annotated[list[NonNegativeInt], Field(min_length=1)]
    tolerance: NonNegativeFloat
    keep: bool
    out: str | None
    overwrite: bool

    @model_validator(mode="after")
    def _check_kill_after(self) -> Self:
        if self.kill_after >= self.steps:
            raise ValueError(
                f"kill_after={self.kill_after} leaves no steps to resume: it must be less than steps={self.steps}"
            )
        return self


class ProveArguments(FrozenConfig):
    """Config keys of ``gptlab.prove`` in addition to those of a run."""

    prove: ProveConfig


def resolve_proof(values: DictConfig, overrides: list[str]) -> tuple[RunConfig, ProveConfig]:
    """Resolves and validates a composed config; returns the config of the run and that of the proof."""
    run = OmegaConf.masked_copy(values, [str(key) for key in values if key != "prove"])
    config = resolve(run, [override for override in overrides if not override.startswith("prove.")])
    return config, validate(ProveArguments, {"prove": resolve_to_dict(values.prove)}).prove


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """Returns a configuration of the first ``steps`` steps of a run, with a trace and a checkpoint after every step.

    The learning rates are those of the whole run. Evaluations and samples are shortened.

    Raises:
        UserError: The run cannot be shortened without changing its learning rates.
    """
    train = config.train
    windows = min(train.eval_windows or EVAL_WINDOWS, EVAL_WINDOWS)
    cut = {"max_steps": steps, "max_tokens": None, "eval_every": max(1, steps // 2), "eval_windows": windows}
    return _with(
        config,
        train=_with(train, **cut, log_every=1),
        trainer=_with(config.trainer, profiler=None),
        schedule=_keep_rates(config.schedule, steps, config.steps),
        callbacks=CallbacksConfig(
            checkpoint=_every_step(config.callbacks.checkpoint),
            samples=_short_samples(config.callbacks.samples),
            trace=TraceConfig(every=1),
            **config.callbacks.components,
        ),
        logger=LoggerConfig(),
    )


def with_deterministic_algorithms(config: RunConfig) -> RunConfig:
    """Returns the configuration with ``trainer.deterministic``."""
    return _with(config, trainer=_with(config.trainer, deterministic=True))


def extended(short: RunConfig) -> RunConfig:
    """Returns a longer run that keeps all checkpoints, so that it is still training when it is killed."""
    steps = short.steps + LONGER
    callbacks = _with(short.callbacks, checkpoint=_with(_every_step(short.callbacks.checkpoint), keep_last=steps))
    return _with(short, train=_with(short.train, max_steps=steps), callbacks=callbacks)


def comparable(short: RunConfig, accelerator: Literal["cpu", "gpu"]) -> RunConfig:
    """Returns the configuration of a run on one device, in float32 and without dropout.

    Its losses and those of the same run on several devices differ only by rounding.
    """
    single = {"devices": 1, "num_nodes": 1, "strategy": "single", "tensor_parallel": 1, "cpu_offload": False}
    return _with(
        short,
        model=_with(short.model, dropout=0.0),
        train=_with(short.train, compile=False),
        trainer=_with(short.trainer, accelerator=accelerator, precision="32-true", **single),
        callbacks=CallbacksConfig(trace=TraceConfig(every=1), **short.callbacks.components),
    )


def on_ranks(config: RunConfig, strategy: str, plan: BatchPlan) -> RunConfig:
    """Returns a configuration with the world size and micro-batch size of a batch plan."""
    trainer = _with(config.trainer, strategy=strategy, devices=plan.world_size)
    return _with(config, trainer=trainer, train=_with(config.train, micro_batch_size=plan.micro_batch_size))


def plan_ranks(train: TrainConfig, ranks: int, at_most: int) -> BatchPlan:
    """Returns the batch plan for a number of ranks, with the largest micro-batch size up to ``at_most``.

    Raises:
        UserError: A global batch size is not divisible by the ranks.
    """
    whole = _with(train, micro_batch_size=None).plan(ranks)
    divisor = math.gcd(*(batch // ranks for batch in whole.stages.sizes))  # a multiple of every valid accumulation
    for accumulation in range(1, divisor + 1):
        size, rest = divmod(whole.micro_batch_size, accumulation)
        if divisor % accumulation == rest == 0 and size <= at_most:
            return _with(train, micro_batch_size=size).plan(ranks)
    raise UserError(f"train.batch_schedule has global batch sizes that no micro-batch size up to {at_most} divides.")


def _keep_rates(schedule: ScheduleConfig, steps: int, whole: int) -> ScheduleConfig:
    """Returns a schedule for the shortened run that has the learning rates of the whole run."""
    if isinstance(schedule, ConstantConfig):
        return schedule
    if isinstance(schedule, ComponentScheduleConfig):
        return _with(schedule, max_steps=schedule.max_steps or whole)
    if not isinstance(schedule, WSDConfig):
        return _with(schedule, decay_steps=schedule.decay_steps or whole)
    stable = round(whole * (1 - schedule.decay_fraction))
    if steps > max(stable, schedule.warmup_steps):
        raise UserError(
            f"prove.steps={steps} is too large: in a run of {whole} steps, schedule=wsd starts to decay after step "
            f"{stable}, which a shortened run cannot reproduce. Decrease prove.steps or increase train.max_steps."
        )
    return ConstantConfig(name="constant", warmup_steps=schedule.warmup_steps)  # equal to WSD until the decay


def _every_step(config: CheckpointConfig | None) -> CheckpointConfig:
    """Returns the given checkpoint config, with a checkpoint after every step."""
    if config is not None:
        return _with(config, every=1)
    return CheckpointConfig(every=1, keep_last=1, keep_best=False, sharded="auto", asynchronous=False)


def _short_samples(config: SamplesConfig | None) -> SamplesConfig | None:
    if config is None:
        return None
    return _with(config, num_samples=1, max_new_tokens=min(config.max_new_tokens, SAMPLE_TOKENS))


def _with(settings: S, **changes: Any) -> S:
    return settings.model_copy(update=changes)
