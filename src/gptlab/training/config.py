"""How a model is trained, on what, and what is kept of it. Imports no torch."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptlab.config.base import FrozenConfig
from gptlab.data.order import BatchSizeSchedule
from gptlab.errors import UserError
from gptlab.training.batch_plan import BatchPlan, plan_batch

Fraction = Annotated[float, Field(ge=0, le=1)]
Average = Annotated[float, Field(ge=0, lt=1)]  # what a running average keeps of itself at every step


class AdamWConfig(FrozenConfig):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"]
    lr: PositiveFloat
    betas: tuple[Average, Average]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    fused: bool | Literal["auto"]


class MuonConfig(FrozenConfig):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for all else; see conf/optimizer/muon.yaml."""

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


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="name")]


class ConstantConfig(FrozenConfig):
    """Warm-up, then the full rate."""

    name: Literal["constant"]
    warmup_steps: NonNegativeInt


class CosineConfig(FrozenConfig):
    """Warm-up, then half a cosine (Loshchilov and Hutter 2017); ``decay_steps`` None is the length of the run."""

    name: Literal["cosine"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    min_lr_ratio: Fraction


class LinearConfig(FrozenConfig):
    """Warm-up, then a line; ``decay_steps`` None is the length of the run."""

    name: Literal["linear"]
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt | None
    min_lr_ratio: Fraction


class WSDConfig(FrozenConfig):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4)."""

    name: Literal["wsd"]
    warmup_steps: NonNegativeInt
    decay_fraction: Fraction
    min_lr_ratio: Fraction


ScheduleConfig = Annotated[ConstantConfig | CosineConfig | LinearConfig | WSDConfig, Field(discriminator="name")]


class TrainConfig(FrozenConfig):
    """Length, batch and rhythm of a run; see conf/train.yaml."""

    max_steps: PositiveInt | None
    max_tokens: PositiveInt | None
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    batch_schedule: list[tuple[PositiveInt, PositiveInt]]
    eval_every: PositiveInt
    eval_windows: PositiveInt | None
    grad_clip: NonNegativeFloat
    ema_decay: Average | None
    max_bad_steps: PositiveInt
    spike_sigma: PositiveFloat | None
    spike_window: Annotated[int, Field(ge=4)]
    compile: bool | Literal["auto", "blocks"]
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    loss_chunk: PositiveInt | Literal["auto"] | None
    log_every: PositiveInt

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError(
                "the length of the run is named once: train.max_steps=<steps>, or train.max_tokens=<tokens> with "
                "train.max_steps=null"
            )
        return self

    @model_validator(mode="after")
    def _batches_grow(self) -> Self:
        ends, sizes = ([stage[part] for stage in self.batch_schedule] for part in (0, 1))
        sizes = [*sizes, self.global_batch_size]
        if any(later <= earlier for numbers in (ends, sizes) for earlier, later in pairwise(numbers)):
            raise ValueError(
                f"batch_schedule={[list(stage) for stage in self.batch_schedule]} should name growing batches, each "
                "with the last step that has it, and all of them smaller than "
                f"global_batch_size={self.global_batch_size}, which follows"
            )
        return self

    @property
    def stages(self) -> BatchSizeSchedule:
        """How many sequences every step has."""
        return BatchSizeSchedule(self.global_batch_size, self.batch_schedule)

    def plan(self, world_size: int) -> BatchPlan:
        """Deal the batches out to so many ranks that read data of their own; UserError: it cannot be done."""
        return plan_batch(self.global_batch_size, self.micro_batch_size, world_size, self.batch_schedule)

    def steps(self, block_size: int) -> int:
        """Length in optimizer steps: enough for ``max_tokens`` where that is what was named."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None  # noqa: S101  (what the validator guarantees)
        return self.stages.steps(-(-self.max_tokens // block_size))


class TrainerConfig(FrozenConfig):
    """Devices and how the model is spread over them; see conf/trainer/."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: PositiveInt | Literal["auto"]
    num_nodes: PositiveInt
    strategy: Literal["single", "ddp", "fsdp", "fsdp_tp"]
    tensor_parallel: PositiveInt
    reshard_after_forward: bool
    cpu_offload: bool
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"]
    float32_matmul: Literal["auto", "default", "onednn"]
    hang_timeout: PositiveFloat | None
    profiler: Literal["simple", "pytorch"] | None

    @model_validator(mode="after")
    def _single_is_one(self) -> Self:
        if self.strategy == "single" and (self.devices not in ("auto", 1) or self.num_nodes > 1):
            raise ValueError(
                f"devices={self.devices} and num_nodes={self.num_nodes} need a strategy for several devices: "
                "trainer=ddp or trainer=fsdp"
            )
        return self

    @model_validator(mode="after")
    def _sharded_only(self) -> Self:
        if self.tensor_parallel > 1 and self.strategy != "fsdp_tp":
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} splits matrices over devices: it needs trainer=fsdp_tp, not "
                f"strategy={self.strategy}"
            )
        if self.cpu_offload and self.strategy not in ("fsdp", "fsdp_tp"):
            raise ValueError(
                "cpu_offload=true keeps on the CPU what FSDP has sharded: it needs trainer=fsdp or trainer=fsdp_tp, "
                f"not strategy={self.strategy}"
            )
        return self

    def data_parallel(self, devices: int, num_nodes: int) -> int:
        """Count the processes that read data of their own: ``tensor_parallel`` of a node share a model and a batch.

        Args:
            devices: Processes of a node.
            num_nodes: Nodes.

        Raises:
            UserError: They cannot be put into groups.
        """
        if devices % self.tensor_parallel:
            raise UserError(
                f"trainer.tensor_parallel={self.tensor_parallel} has to divide the devices of a machine, and there are "
                f"{devices} (trainer.devices)."
            )
        return devices // self.tensor_parallel * num_nodes


class CheckpointConfig(FrozenConfig):
    """When checkpoints are written, how, and which are kept; see conf/callbacks/checkpoint.yaml."""

    every: PositiveInt | None
    keep_last: PositiveInt
    keep_best: bool
    sharded: bool | Literal["auto"]
    asynchronous: bool


class SamplesConfig(FrozenConfig):
    """What is written as the model learns; see ``gptlab.model.generation.generate``."""

    prompt: str
    num_samples: PositiveInt
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: PositiveInt | None


class HellaSwagConfig(FrozenConfig):
    """What is scored as the model learns; see conf/callbacks/hellaswag.yaml."""

    path: str
    every: PositiveInt | None
    limit: PositiveInt | None
    batch_size: PositiveInt


class EarlyStoppingConfig(FrozenConfig):
    """Stop after ``patience`` evaluations that improve val loss by no more than ``min_delta``."""

    patience: PositiveInt
    min_delta: NonNegativeFloat


class TraceConfig(FrozenConfig):
    """Hashes of every so many steps; see ``gptlab.training.callbacks.determinism_trace``."""

    every: PositiveInt


class CallbacksConfig(FrozenConfig):
    """The callbacks that a run has; None is a callback it does not have."""

    checkpoint: CheckpointConfig | None = None
    samples: SamplesConfig | None = None
    hellaswag: HellaSwagConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    trace: TraceConfig | None = None
