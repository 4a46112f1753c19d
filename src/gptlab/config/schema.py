"""The whole configuration of a run: types, ranges and the rules between its parts. Imports no torch."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, Field, PositiveFloat, ValidationError, model_validator
from pydantic_core import ErrorDetails

from gptlab.config.base import Settings
from gptlab.config.hub_names import is_on_hub
from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.errors import UserError, did_you_mean
from gptlab.model.config import GPTConfig, LoRAConfig
from gptlab.training.config import CallbacksConfig, OptimizerConfig, ScheduleConfig, TrainConfig, TrainerConfig

S = TypeVar("S", bound=Settings)
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators take


class WandbConfig(Settings):
    """A run on Weights & Biases."""

    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: list[str]
    mode: Literal["auto", "online", "offline"]
    init_timeout: PositiveFloat
    finish_timeout: PositiveFloat
    alert_wait: PositiveFloat | None
    checkpoints: Literal["none", "best", "all"]


class TensorBoardConfig(Settings):
    """TensorBoard event files in the run directory."""


class LoggerConfig(Settings):
    """The loggers a run has beside metrics.csv; None is one it does not have."""

    wandb: WandbConfig | None = None
    tensorboard: TensorBoardConfig | None = None


class Config(Settings):
    """Everything that makes a training run what it is."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Seed
    resume: str | None
    force_resume: bool
    init_from: str | None
    resume_from_nanogpt: str | None = None
    model: GPTConfig
    lora: LoRAConfig | None = None
    data: DataConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    trainer: TrainerConfig
    callbacks: CallbacksConfig
    logger: LoggerConfig

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        named = [key for key in ("resume", "init_from", "resume_from_nanogpt") if getattr(self, key)]
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(named)} exclude each other: a run goes on, or it starts from other weights"
            )
        return self

    @model_validator(mode="after")
    def _heads_are_dealt_out(self) -> Self:
        parts, heads = self.trainer.tensor_parallel, self.model.n_head
        if parts > 1 and (self.model.value_residual or self.model.value_embeddings):
            raise ValueError(
                "model.value_residual and model.value_embeddings mix values that fsdp_tp splits by heads, which is not "
                "built; trainer=fsdp and trainer=ddp have them"
            )
        if heads % parts:
            raise ValueError(
                f"trainer.tensor_parallel={parts} has to divide model.n_head={heads}: the attention is split by heads"
            )
        return self

    @model_validator(mode="after")
    def _adapts_with_adamw(self) -> Self:
        if self.lora and self.optimizer.name != "adamw":
            raise ValueError(
                f"lora trains thin matrices, which optimizer={self.optimizer.name} is not for: optimizer=adamw"
            )
        if self.lora and self.trainer.tensor_parallel > 1:
            raise ValueError(
                f"trainer.tensor_parallel={self.trainer.tensor_parallel} splits matrices that lora has none of its own "
                "parts for; trainer=fsdp and trainer=ddp have them"
            )
        return self

    @model_validator(mode="after")
    def _averages_are_fine(self) -> Self:
        if self.train.ema_decay is not None and self.trainer.precision == "bf16-true":
            raise ValueError(
                f"train.ema_decay={self.train.ema_decay} moves an average by less than bfloat16 can tell: "
                "trainer.precision=bf16-mixed keeps the weights, and their average, in float32"
            )
        return self

    @property
    def steps(self) -> int:
        """Length in optimizer steps."""
        return self.train.steps(self.model.block_size)

    def with_vocabulary(self, size: int) -> Self:
        """Fill in the tokenizer's vocabulary; UserError where the model names another."""
        if self.model.vocab_size not in (None, size):
            raise UserError(
                f"model.vocab_size={self.model.vocab_size} is not the {size} ids of tokenizer={self.tokenizer.name}; "
                "leave it null to take them. A larger embedding is model.pad_vocab_to_multiple_of."
            )
        model = self.model.model_copy(update={"vocab_size": size})
        return self.model_copy(update={"model": model})

    def with_absolute_paths(self) -> Self:
        """Make the configuration independent of the folder it was typed in."""
        data = {key: _absolute(value) for key in ("source", "cache_dir") if (value := getattr(self.data, key))}
        if self.data.corpus == "shards" and self.data.path and not self.data.is_remote:
            data["path"] = _absolute(self.data.path)
        vocab_dir = self.tokenizer.vocab_dir and _absolute(self.tokenizer.vocab_dir)
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
                "tokenizer": self.tokenizer.model_copy(update={"vocab_dir": vocab_dir}),
                "callbacks": callbacks,
                "init_from": init_from,
                "resume_from_nanogpt": nanogpt,
            }
        )


def check(settings: type[S], values: Mapping[str, Any]) -> S:
    """Check a whole resolved configuration; UserError has a sentence for everything that is wrong."""
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        keys = set(known_keys(settings))
        raise UserError("\n".join(_sentence(details, values, keys) for details in error.errors())) from None


def known_keys(settings: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting, groups included."""
    for name, field in settings.model_fields.items():
        yield prefix + name
        for part in _models_in(field.annotation):
            yield from known_keys(part, f"{prefix}{name}.")


def no_setting(key: str, keys: set[str]) -> str:
    """Say that ``key`` is not there, and what may have been meant, of the settings that there are."""
    if key in keys:
        return f"{key} is a setting of other options of {key.partition('.')[0]}=, not of the one chosen here."
    return f"{key} is no setting.{did_you_mean(key, keys)} All are shown by --cfg job."


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Find the settings classes inside unions and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _sentence(details: ErrorDetails, values: Mapping[str, Any], keys: set[str]) -> str:
    """Say what is wrong with one key."""
    key = _key(details["loc"], values)
    match details["type"]:
        case "extra_forbidden":
            return no_setting(key, keys)
        case "missing":
            return f"{key} is missing: name it on the command line, {key}=<value>."
        case "value_error":
            return f"{key}: {details['ctx']['error']}." if key else f"{details['ctx']['error']}."
        case "union_tag_invalid":
            return f"{key}.name={details['ctx']['tag']} is unknown; there are {details['ctx']['expected_tags']}."
    expected = details["msg"].replace("Input should be ", "it should be ")
    return f"{key}={details['input']!r} is not right: {expected}."


def _key(location: tuple[int | str, ...], values: Any) -> str:
    """Name the setting at ``location``, which also holds the branches of unions that pydantic went through."""
    parts: list[str] = []
    for part in location:
        inside = values.get(part) if isinstance(values, Mapping) else None
        named = isinstance(values, Mapping) and (part in values or part == location[-1])
        if isinstance(part, str) and not named:
            continue
        if isinstance(part, int) and not isinstance(values, list):
            continue
        parts.append(str(part))
        values = values[part] if isinstance(part, int) else inside
    return ".".join(parts)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
