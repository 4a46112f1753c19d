"""How a model is trained, on what, and what is kept of it. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptlab.settings import Settings

BEST, LAST = "best.ckpt", "last.ckpt"  # the checkpoints of a run

Fraction = Annotated[float, Field(ge=0, le=1)]


class AdamWConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"]
    lr: PositiveFloat
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    fused: bool | Literal["auto"]


class ConstantConfig(Settings):
    """Warm-up, then the full rate."""

    name: Literal["constant"]
    warmup_steps: NonNegativeInt


class CosineConfig(Settings):
    """Warm-up, then half a cosine (Loshchilov and Hutter 2017); ``decay_steps`` None is the length of the run."""

    name: Literal["cosine"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    min_lr_ratio: Fraction


class LinearConfig(Settings):
    """Warm-up, then a line; ``decay_steps`` None is the length of the run."""

    name: Literal["linear"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    min_lr_ratio: Fraction


class WSDConfig(Settings):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4)."""

    name: Literal["wsd"]
    warmup_steps: NonNegativeInt
    decay_fraction: Fraction
    min_lr_ratio: Fraction


ScheduleConfig = Annotated[ConstantConfig | CosineConfig | LinearConfig | WSDConfig, Field(discriminator="name")]


class TrainConfig(Settings):
    """Length, batch and rhythm of a run; see conf/train.yaml."""

    max_steps: PositiveInt | None
    max_tokens: PositiveInt | None
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    eval_every: PositiveInt
    eval_windows: PositiveInt | None
    grad_clip: NonNegativeFloat
    compile: bool | Literal["auto"]
    log_every: PositiveInt

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError(
                "the length of the run is named once: train.max_steps=<steps>, or train.max_tokens=<tokens> with "
                "train.max_steps=null"
            )
        return self

    def steps(self, block_size: int) -> int:
        """Length in optimizer steps: enough for ``max_tokens`` where that is what was named."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None  # noqa: S101  (what the validator guarantees)
        return -(-self.max_tokens // (self.global_batch_size * block_size))


class TrainerConfig(Settings):
    """Devices and how the model is spread over them; see conf/trainer/."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: PositiveInt | Literal["auto"]
    num_nodes: PositiveInt
    strategy: Literal["single", "ddp", "fsdp"]
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"]
    profiler: Literal["simple", "pytorch"] | None

    @model_validator(mode="after")
    def _single_is_one(self) -> Self:
        if self.strategy == "single" and (self.devices not in ("auto", 1) or self.num_nodes > 1):
            raise ValueError(
                f"devices={self.devices} and num_nodes={self.num_nodes} need a strategy for several devices: "
                "trainer=ddp or trainer=fsdp"
            )
        return self


class CheckpointConfig(Settings):
    """Which checkpoints are kept: the best val loss, the last evaluation."""

    best: bool
    last: bool


class SamplesConfig(Settings):
    """What is written as the model learns; see ``gptlab.model.generate``."""

    prompt: str
    num_samples: PositiveInt
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: PositiveInt | None


class EarlyStoppingConfig(Settings):
    """Stop after ``patience`` evaluations that improve val loss by no more than ``min_delta``."""

    patience: PositiveInt
    min_delta: NonNegativeFloat


class CallbacksConfig(Settings):
    """The callbacks that a run has; None is a callback it does not have."""

    checkpoint: CheckpointConfig | None = None
    samples: SamplesConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
