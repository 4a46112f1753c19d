"""Config of ``python -m gptlab.evaluate`` and its validation before a model is loaded. Imports no torch."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gptlab.config.base import FrozenConfig
from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.errors import UserError, install_extra
from gptlab.pretrained.source import ModelSource

TOKENS_PER_BATCH = 8192  # default batch size
Split = Literal["val", "train", "all"]


class EvaluateConfig(FrozenConfig):
    """Config of ``python -m gptlab.evaluate``; see conf/evaluate.yaml."""

    run: Annotated[str, Field(min_length=1)]
    data: DataConfig | None = None
    tokenizer: TokenizerConfig | None = None
    split: Split
    windows: PositiveInt | None
    stride: PositiveInt | None
    tasks: list[Annotated[str, Field(min_length=1)]]
    task_dir: str | None
    num_fewshot: NonNegativeInt | None
    cache: str | None
    hellaswag: str | None
    limit: PositiveInt | None
    batch_size: PositiveInt | None
    precision: Literal["auto", "float32", "bfloat16"]
    out: str | None

    @property
    def on_corpus(self) -> bool:
        """Whether to score a corpus, which is the default without ``tasks`` and ``hellaswag``."""
        return not self.tasks and self.hellaswag is None

    def _named(self, keys: tuple[str, ...]) -> str:
        return " and ".join(key for key in keys if getattr(self, key) is not None)

    def rows(self, block_size: int) -> int:
        """Returns the number of windows, texts or examples per batch, for a model with this block size."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // block_size)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        corpus, tasks = ("data", "windows", "stride"), ("task_dir", "num_fewshot", "cache")
        if not self.on_corpus and (unused := self._named(corpus)):
            raise ValueError(f"{unused} cannot be combined with tasks or hellaswag, which have their own texts")
        if not self.tasks and (unused := self._named(tasks)):
            raise ValueError(f"{unused} has no effect without tasks")
        if self.on_corpus and self.limit is not None:
            raise ValueError("limit applies only to tasks and hellaswag; use windows=<number> for part of a corpus")
        return self


def check_request(config: EvaluateConfig, source: ModelSource) -> None:
    """Checks a config before the model is loaded.

    Raises:
        UserError: A package or a directory is missing, or the stride exceeds the block size of the model.
    """
    if config.stride is not None and config.stride > source.model.block_size:
        raise UserError(
            f"stride={config.stride} would skip tokens. It must be at most block_size={source.model.block_size} of the "
            "model."
        )
    if config.tasks and find_spec("lm_eval") is None:
        raise UserError(
            f"tasks requires the lm_eval package, which is not installed. Install it with: {install_extra('harness')}"
        )
    if config.task_dir is not None and not Path(config.task_dir).expanduser().is_dir():
        raise UserError(f"task_dir={config.task_dir} is not a directory (relative to {Path.cwd()}).")
