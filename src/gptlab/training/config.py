"""Configuration of training: optimizer, schedule, trainer and callbacks. Imports no torch."""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from gptlab.config.base import ComponentConfig, FrozenConfig, Location, component_or_name
from gptlab.config.components import Component, bind_component, enabled_components
from gptlab.data.order import BatchSizeSchedule, BatchSizeStage
from gptlab.errors import UserError
from gptlab.model.config import NumNewTokens, NumSamples
from gptlab.training.batch_plan import BatchPlan, plan_batch

Fraction = Annotated[float, Field(ge=0, le=1)]
Average = Annotated[float, Field(ge=0, lt=1)]  # decay of a running average per step


# Arguments of Lightning's Trainer that gptlab sets, and the config key that determines each
OWNED_FLAGS = {
    "accelerator": "trainer.accelerator",
    "strategy": "trainer.strategy",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "precision": "trainer.precision",
    "plugins": "trainer.precision and callbacks.checkpoint",
    "profiler": "trainer.profiler",
    "deterministic": "trainer.deterministic",
    "benchmark": "trainer.deterministic",
    "default_root_dir": "name",
    "max_steps": "train.max_steps",
    "max_epochs": "train.max_steps",
    "min_steps": "train.max_steps",
    "min_epochs": "train.max_steps",
    "max_time": "callbacks=timer",
    "accumulate_grad_batches": "train.global_batch_size and train.micro_batch_size",
    "gradient_clip_val": "train.grad_clip",
    "gradient_clip_algorithm": "train.grad_clip",
    "val_check_interval": "train.eval_every",
    "check_val_every_n_epoch": "train.eval_every",
    "limit_val_batches": "train.eval_windows",
    "limit_train_batches": "train.max_steps",
    "num_sanity_val_steps": "train.eval_every",
    "log_every_n_steps": "train.log_every",
    "overfit_batches": "debug=overfit",
    "fast_dev_run": "debug=one_step",
    "callbacks": "callbacks.<name>",
    "logger": "logger.<name>",
    "enable_checkpointing": "callbacks.checkpoint",
    "enable_progress_bar": "gptlab's own progress bar",
    "enable_model_summary": "gptlab's own summary",
    "use_distributed_sampler": "data.order",
    "reload_dataloaders_every_n_epochs": "data.order",
    "inference_mode": "gptlab",
    "barebones": "gptlab",
}


class AdamWConfig(FrozenConfig):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"]
    lr: PositiveFloat
    betas: tuple[Average, Average]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    fused: bool | Literal["auto"]


class MuonConfig(FrozenConfig):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest; see conf/optimizer/muon.yaml."""

    name: Literal["muon"]
    lr: PositiveFloat
    momentum: Average
    momentum_warmup_from: Average
    momentum_warmup_steps: NonNegativeInt
    ns_steps: Annotated[int, Field(ge=1, lt=100)]
    ns_dtype: Literal["bfloat16", "float32"]
    adjust_lr: Literal["original", "match_rms_adamw"]
    weight_decay: NonNegativeFloat
    cautious: bool
    embedding_lr: PositiveFloat
    head_lr: PositiveFloat
    vector_lr: PositiveFloat
    betas: tuple[Average, Average]
    eps: PositiveFloat
    adamw_weight_decay: NonNegativeFloat
    fused: bool | Literal["auto"]


class ComponentOptimizerConfig(ComponentConfig):
    """Any torch optimizer, by ``_target_``; the other keys are its arguments.

    It gets GPT-2's two parameter groups, with and without ``weight_decay``, or those of the component
    ``param_groups``, a function of the model.
    """

    lr: PositiveFloat
    weight_decay: NonNegativeFloat | None = None
    param_groups: Component = None
    _state_size: int | None = PrivateAttr(None)

    @property
    def state_size(self) -> int | None:
        """Number of elements of the optimizer state for all parameters; None if it has not been counted."""
        return self._state_size

    def with_state_size(self, size: int | None) -> Self:
        """Returns a copy with the counted size of the optimizer state."""
        counted = self.model_copy()
        counted._state_size = size  # noqa: SLF001  (its own)
        return counted

    @property
    def fused(self) -> bool:
        """Whether gptlab selects a fused kernel."""
        return False


class ComponentScheduleConfig(ComponentConfig):
    """Any function ``f(step, *, lr, max_steps)`` that returns a learning rate, by ``_target_``.

    The other keys are its arguments. ``max_steps`` is the length of the run unless it is set.
    """

    max_steps: PositiveInt | None = None

    @cached_property
    def function(self) -> Callable[..., float]:
        """The function with its arguments, which is called in every step."""
        return bind_component(self.component)

    @property
    def warmup_steps(self) -> int:
        """Steps of the built-in linear warm-up, which such a schedule does not have."""
        return 0


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[ComponentOptimizerConfig, Tag("component")],
    Discriminator(component_or_name),
]


class ConstantConfig(FrozenConfig):
    """Linear warm-up, then a constant learning rate."""

    name: Literal["constant"]
    warmup_steps: NonNegativeInt


class CosineConfig(FrozenConfig):
    """Linear warm-up, then cosine decay (Loshchilov and Hutter 2017). ``decay_steps=None`` is the length of the run."""

    name: Literal["cosine"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    min_lr_ratio: Fraction


class LinearConfig(FrozenConfig):
    """Linear warm-up, then linear decay. ``decay_steps=None`` is the length of the run."""

    name: Literal["linear"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    min_lr_ratio: Fraction


class WSDConfig(FrozenConfig):
    """Warmup-stable-decay schedule (Hu et al. 2024, MiniCPM, section 4)."""

    name: Literal["wsd"]
    warmup_steps: NonNegativeInt
    decay_fraction: Fraction
    min_lr_ratio: Fraction


ScheduleConfig = Annotated[
    Annotated[ConstantConfig, Tag("constant")]
    | Annotated[CosineConfig, Tag("cosine")]
    | Annotated[LinearConfig, Tag("linear")]
    | Annotated[WSDConfig, Tag("wsd")]
    | Annotated[ComponentScheduleConfig, Tag("component")],
    Discriminator(component_or_name),
]


# Lightning counts steps in C's int. The largest batch sizes in use are millions of tokens.
Steps = Annotated[PositiveInt, Field(lt=2**31)]
BatchSize = Annotated[PositiveInt, Field(le=2**24)]


class TrainConfig(FrozenConfig):
    """Length, batch size and intervals of a run; see conf/train.yaml."""

    max_steps: Steps | None
    max_tokens: PositiveInt | None
    global_batch_size: BatchSize
    micro_batch_size: BatchSize | None
    batch_schedule: list[tuple[Steps, BatchSize]]
    past_batches: list[tuple[Steps, BatchSize]] = Field(default_factory=list)
    eval_every: PositiveInt
    eval_windows: PositiveInt | None
    grad_clip: NonNegativeFloat
    ema_decay: Average | None
    max_bad_steps: PositiveInt
    spike_sigma: PositiveFloat | None
    spike_window: Annotated[int, Field(ge=4, le=1_000_000)]
    compile: bool | Literal["auto", "blocks"]
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    loss_chunk: PositiveInt | Literal["auto"] | None
    log_every: PositiveInt

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError(
                "exactly one of max_steps and max_tokens must be set: train.max_steps=<steps>, or "
                "train.max_tokens=<tokens> with train.max_steps=null"
            )
        return self

    @model_validator(mode="after")
    def _batches_grow(self) -> Self:
        ends, sizes = ([stage[part] for stage in self.batch_schedule] for part in (0, 1))
        sizes = [*sizes, self.global_batch_size]
        if any(later <= earlier for numbers in (ends, sizes) for earlier, later in pairwise(numbers)):
            raise ValueError(
                f"batch_schedule={[list(stage) for stage in self.batch_schedule]} must be a list of [last step, batch "
                "size] pairs in which both values increase, and every batch size must be less than "
                f"global_batch_size={self.global_batch_size}"
            )
        return self

    @property
    def stages(self) -> BatchSizeSchedule:
        """Batch size schedule, in sequences per step."""
        return BatchSizeSchedule(self.global_batch_size, self._remaining_stages, self.past_batches)

    def plan(self, world_size: int) -> BatchPlan:
        """Divides the batches among ``world_size`` data-parallel ranks; raises UserError if they are not divisible."""
        return plan_batch(
            self.global_batch_size, self.micro_batch_size, world_size, self._remaining_stages, self.past_batches
        )

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether code that is compiled for a GPU runs as CUDA graphs."""
        return self.compile_mode in ("reduce-overhead", "max-autotune")

    @property
    def past_steps(self) -> int:
        """Number of steps in ``past_batches``."""
        return self.past_batches[-1][0] if self.past_batches else 0

    @property
    def _remaining_stages(self) -> list[BatchSizeStage]:
        """Stages of ``batch_schedule`` that end after ``past_batches``."""
        return [stage for stage in self.batch_schedule if stage[0] > self.past_steps]

    def batches_until(self, step: int) -> list[BatchSizeStage]:
        """Returns the stages of the first ``step`` steps, as values of ``past_batches``."""
        stages = [*self.past_batches, *self._remaining_stages, (step, self.global_batch_size)]
        number = next(number for number, (end, _) in enumerate(stages) if end >= step)
        return [*stages[:number], (step, stages[number][1])]

    def steps(self, block_size: int) -> int:
        """Returns the length of the run in optimizer steps: ``max_steps``, or enough steps for ``max_tokens``."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None  # noqa: S101  (guaranteed by the validator)
        return self.stages.steps(-(-self.max_tokens // block_size))


class TrainerConfig(FrozenConfig):
    """Devices, strategy and precision; see conf/trainer/."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: PositiveInt | Literal["auto"]
    num_nodes: PositiveInt
    strategy: Literal["single", "ddp", "fsdp", "fsdp_tp"]
    tensor_parallel: PositiveInt
    reshard_after_forward: bool
    cpu_offload: bool
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"]
    float32_matmul: Literal["auto", "default", "onednn", "tf32"]
    deterministic: bool = False  # run directories of earlier versions do not have it
    hang_timeout: PositiveFloat | None
    profiler: Literal["simple", "pytorch"] | None
    flags: dict[str, Any] = Field(default_factory=dict)  # run directories of earlier versions have none

    @field_validator("flags")
    @classmethod
    def _check_flags(cls, flags: dict[str, Any]) -> dict[str, Any]:
        for name in flags:
            if name in OWNED_FLAGS:
                raise ValueError(f"the Trainer's {name} is set by {OWNED_FLAGS[name]}")
        return flags

    @model_validator(mode="after")
    def _single_strategy_has_one_device(self) -> Self:
        if self.strategy == "single" and (self.devices not in ("auto", 1) or self.num_nodes > 1):
            raise ValueError(
                f"devices={self.devices} and num_nodes={self.num_nodes} need a distributed strategy, but "
                "strategy=single. Use trainer=ddp or trainer=fsdp"
            )
        return self

    @model_validator(mode="after")
    def _strategy_supports_options(self) -> Self:
        if self.tensor_parallel > 1 and self.strategy != "fsdp_tp":
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} splits matrices over devices, which strategy={self.strategy} "
                "does not support. Use trainer=fsdp_tp"
            )
        if self.cpu_offload and self.strategy not in ("fsdp", "fsdp_tp"):
            raise ValueError(
                f"cpu_offload=true offloads the shards of FSDP, which strategy={self.strategy} does not have. "
                "Use trainer=fsdp or trainer=fsdp_tp"
            )
        return self

    def data_parallel(self, devices: int, num_nodes: int) -> int:
        """Returns the number of data-parallel ranks. ``tensor_parallel`` devices of a node form one rank.

        Args:
            devices: Number of devices per node.
            num_nodes: Number of nodes.

        Raises:
            UserError: ``devices`` is not divisible by ``tensor_parallel``.
        """
        if devices % self.tensor_parallel:
            raise UserError(
                f"trainer.tensor_parallel={self.tensor_parallel} does not divide the number of devices per node, "
                f"trainer.devices={devices}."
            )
        return devices // self.tensor_parallel * num_nodes


class CheckpointConfig(FrozenConfig):
    """Interval, format and retention of checkpoints; see conf/callbacks/checkpoint.yaml."""

    every: PositiveInt | None
    keep_last: PositiveInt
    keep_best: bool
    sharded: bool | Literal["auto"]
    asynchronous: bool


class SamplesConfig(FrozenConfig):
    """Text samples during training; see ``gptlab.training.callbacks.samples``."""

    prompt: str
    num_samples: NumSamples
    max_new_tokens: NumNewTokens
    temperature: NonNegativeFloat
    top_k: PositiveInt | None


class HellaSwagConfig(FrozenConfig):
    """HellaSwag accuracy during training; see conf/callbacks/hellaswag.yaml."""

    path: Annotated[str, Location]
    every: PositiveInt | None
    limit: PositiveInt | None
    batch_size: PositiveInt


class EarlyStoppingConfig(FrozenConfig):
    """Early stopping after ``patience`` evaluations that do not improve ``monitor`` by more than ``min_delta``."""

    monitor: str = "val/loss"  # run directories of earlier versions have neither key
    mode: Literal["min", "max"] = "min"
    patience: PositiveInt
    min_delta: NonNegativeFloat


class TraceConfig(FrozenConfig):
    """Determinism trace of every ``every`` steps; see ``gptlab.training.callbacks.determinism_trace``."""

    every: PositiveInt


class CallbacksConfig(FrozenConfig):
    """Callbacks of a run; None disables a callback. Other names are components: any Lightning callback."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Component]

    checkpoint: CheckpointConfig | None = None
    samples: SamplesConfig | None = None
    hellaswag: HellaSwagConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    trace: TraceConfig | None = None

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """The components by name, without those that are null."""
        return enabled_components(self.model_extra)
