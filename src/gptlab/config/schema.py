"""Configuration of a training run: types, ranges, and checks across groups. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, model_validator

from gptlab.config.base import FrozenConfig, Location
from gptlab.config.components import Component, enabled_components
from gptlab.data.config import BuiltInTokenizerConfig, DataConfig, TokenizerConfig
from gptlab.errors import UserError
from gptlab.model.config import LoRAConfig, ModelConfig
from gptlab.training.config import CallbacksConfig, OptimizerConfig, ScheduleConfig, TrainConfig, TrainerConfig
from gptlab.training.hardware import Hardware, resolve_loss_chunk

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range of torch's generators
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",  # of a directory, on any file system
        max_length=200,
        description="a name of letters (A-Z), digits, '.', '_' and '-' that begins with a letter or a digit",
    ),
]

# OpenAI's four sizes (Radford et al. 2019, table 2) by the names that nanoGPT and transformers use
GPT2_REPOSITORIES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_PREFIX = "hf://"  # prefix of other models on the Hugging Face Hub: hf://<owner>/<name>


def _split_tags(tags: object) -> object:
    """Splits tags in the format of WANDB_TAGS, "a,b"; None is no tags."""
    if tags is None:
        return []
    return [tag for part in tags.split(",") if (tag := part.strip())] if isinstance(tags, str) else tags


class WandbConfig(FrozenConfig):
    """Weights & Biases logger; see conf/logger/wandb.yaml."""

    project: str
    entity: Annotated[str | None, Location]
    name: str | None
    notes: str | None
    group: str | None
    job_type: str | None
    tags: Annotated[list[str], BeforeValidator(_split_tags)]
    mode: Literal["auto", "online", "offline"]
    init_timeout: PositiveFloat
    finish_timeout: PositiveFloat
    alert_wait: PositiveFloat | None
    checkpoints: Literal["none", "best", "all"]


class TensorBoardConfig(FrozenConfig):
    """TensorBoard event files in the run directory."""


class LoggerConfig(FrozenConfig):
    """Loggers of a run in addition to metrics.csv; None disables a logger.

    Other names are components: any Lightning logger.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Component]

    wandb: WandbConfig | None = None
    tensorboard: TensorBoardConfig | None = None

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """The components by name, without those that are null."""
        return enabled_components(self.model_extra)


class RunConfig(FrozenConfig):
    """Configuration of a training run; see conf/train.yaml.

    It is validated once, by the process that starts the run. Workers rebuild it without validation (``rebuild``).
    """

    name: Name
    seed: Seed
    resume: Annotated[str | None, Location]
    force_resume: bool
    init_from: Annotated[str | None, Location]
    resume_from_nanogpt: Annotated[str | None, Location] = None
    model: ModelConfig
    lora: LoRAConfig | None = None
    data: DataConfig
    tokenizer: TokenizerConfig
    loss: Component = None
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    trainer: TrainerConfig
    callbacks: CallbacksConfig
    logger: LoggerConfig

    @model_validator(mode="after")
    def _check_single_start(self) -> Self:
        named = [key for key in ("resume", "init_from", "resume_from_nanogpt") if getattr(self, key)]
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(named)} are mutually exclusive: a run either resumes or starts from other weights"
            )
        return self

    @model_validator(mode="after")
    def _check_tensor_parallel(self) -> Self:
        parts, heads = self.trainer.tensor_parallel, self.model.n_head
        if parts > 1 and (self.model.value_residual or self.model.value_embeddings):
            raise ValueError(
                "model.value_residual and model.value_embeddings are not implemented for trainer=fsdp_tp, which splits "
                "attention values by heads. Use trainer=fsdp or trainer=ddp"
            )
        if parts > 1 and self.model.components:
            raise ValueError(
                "trainer=fsdp_tp is not implemented for models with components. Use trainer=fsdp or trainer=ddp"
            )
        if heads % parts:
            raise ValueError(
                f"model.n_head={heads} is not divisible by trainer.tensor_parallel={parts}: attention is split by heads"
            )
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.lora and self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer={self.optimizer.name} is not supported with lora, since it is not suitable for low-rank "
                "matrices. Use optimizer=adamw"
            )
        if self.lora and not {"activation", "norm"}.issuperset(self.model.components):
            raise ValueError("lora is not implemented for a model, block or attention that is a component")
        if self.lora and self.trainer.tensor_parallel > 1:
            raise ValueError(
                f"trainer.tensor_parallel={self.trainer.tensor_parallel} is not implemented for lora. Use "
                "trainer=fsdp or trainer=ddp"
            )
        return self

    @model_validator(mode="after")
    def _check_sharded_optimizer(self) -> Self:
        if self.optimizer.name == "torch.optim.Adafactor" and self.trainer.strategy.startswith("fsdp"):
            raise ValueError(
                f"optimizer=adafactor does not work with trainer={self.trainer.strategy}: torch.optim.Adafactor cannot "
                "update sharded weights (torch 2.13). Use trainer=ddp or another optimizer"
            )
        return self

    @model_validator(mode="after")
    def _check_deterministic(self) -> Self:
        if self.trainer.deterministic and self.train.compile_mode.startswith("max-autotune"):
            raise ValueError(
                f"train.compile_mode={self.train.compile_mode} chooses kernels by their measured speed, which "
                "trainer.deterministic=true does not allow. Use train.compile_mode=default or reduce-overhead"
            )
        return self

    @model_validator(mode="after")
    def _check_ema_precision(self) -> Self:
        if self.train.ema_decay is not None and self.trainer.precision == "bf16-true":
            raise ValueError(
                f"train.ema_decay={self.train.ema_decay} does not work with trainer.precision=bf16-true: updates of "
                "the average would be below the resolution of bfloat16. Use trainer.precision=bf16-mixed, which keeps "
                "the weights and their average in float32"
            )
        return self

    def loss_chunk(self, hardware: Hardware) -> int | None:
        """Returns the number of tokens whose logits training computes at a time; None for all, as with a ``loss``."""
        return resolve_loss_chunk(None if self.loss else self.train.loss_chunk, self.model, hardware)

    @property
    def steps(self) -> int:
        """Length of the run in optimizer steps."""
        return self.train.steps(self.model.block_size)

    def with_vocabulary(self, size: int) -> Self:
        """Returns a copy with the vocabulary size of the tokenizer.

        Args:
            size: Vocabulary size, in token IDs.

        Raises:
            UserError: ``model.vocab_size`` is set to another size.
        """
        if self.model.vocab_size not in (None, size):
            raise UserError(
                f"model.vocab_size={self.model.vocab_size} differs from tokenizer={self.tokenizer.name}, which has "
                f"{size} token IDs. Set it to null. For a larger embedding, set model.pad_vocab_to_multiple_of."
            )
        model = self.model.model_copy(update={"vocab_size": size})
        return self.model_copy(update={"model": model})

    def with_absolute_paths(self) -> Self:
        """Returns a copy with absolute paths, which are valid in any working directory."""
        data = {key: _absolute(value) for key in ("source", "cache_dir") if (value := getattr(self.data, key))}
        if self.data.corpus == "shards" and self.data.path and not self.data.is_remote:
            data["path"] = _absolute(self.data.path)
        tokenizer = self.tokenizer
        if isinstance(tokenizer, BuiltInTokenizerConfig):
            places = {key: _absolute(value) for key in ("vocab_dir", "path") if (value := getattr(tokenizer, key))}
            tokenizer = tokenizer.model_copy(update=places)
        callbacks = self.callbacks
        if (wanted := callbacks.hellaswag) is not None:
            placed = wanted.model_copy(update={"path": _absolute(wanted.path)})
            callbacks = callbacks.model_copy(update={"hellaswag": placed})
        init_from = self.init_from
        if init_from and not is_on_hub(init_from):
            init_from = _absolute(init_from)
        nanogpt = self.resume_from_nanogpt and _absolute(self.resume_from_nanogpt)
        return self.model_copy(
            update={
                "data": self.data.model_copy(update=data),
                "tokenizer": tokenizer,
                "callbacks": callbacks,
                "init_from": init_from,
                "resume_from_nanogpt": nanogpt,
            }
        )


def is_on_hub(name: str) -> bool:
    """Whether ``name`` is a model on the Hugging Face Hub; a local path of that name takes precedence."""
    return (name in GPT2_REPOSITORIES or name.startswith(HUB_PREFIX)) and not Path(name).exists()


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
