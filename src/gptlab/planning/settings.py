"""The config keys of ``gptlab.plan`` beside those of a run. Imports no torch."""

from typing import Annotated

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveFloat

from gptlab.config.base import FrozenConfig, validate
from gptlab.config.resume import resolve, resolve_to_dict
from gptlab.config.schema import RunConfig
from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.data.prepare.prepare import find_prepared
from gptlab.data.prepare.splitting import check_val_split
from gptlab.data.shards.manifest import Manifest
from gptlab.data.tokenizers.tokenizer import BytesTokenizer, GPT2Tokenizer
from gptlab.errors import UserError


class PlanConfig(FrozenConfig):
    """Keys of a plan; see conf/plan.yaml."""

    gpu: list[str] | str | None
    mfu: Annotated[float, Field(gt=0, le=1)]
    budget: PositiveFloat | None
    calibrate: bool
    json_file: Annotated[str | None, Field(alias="json")]

    @property
    def gpus(self) -> list[str]:
        """Names of GPUs."""
        return [self.gpu] if isinstance(self.gpu, str) else list(self.gpu or ())


KEYS = ("gpu", "mfu", "budget", "calibrate", "json")


def resolve_plan(values: DictConfig, overrides: list[str]) -> tuple[RunConfig, PlanConfig]:
    """Resolves and validates what Hydra composed: the run, as ``gptlab.train`` does, and the keys of the plan."""
    run = OmegaConf.masked_copy(values, [str(key) for key in values if key not in KEYS])
    wanted = OmegaConf.masked_copy(values, list(KEYS))
    return resolve(run, run_overrides(overrides)), validate(PlanConfig, resolve_to_dict(wanted))


def run_overrides(overrides: list[str]) -> list[str]:
    """Returns the overrides of the run, without the keys of the plan."""
    return [override for override in overrides if override.lstrip("+").partition("=")[0] not in KEYS]


def with_vocabulary(config: RunConfig) -> tuple[RunConfig, Manifest | None]:
    """Completes a configuration with its vocabulary, from the data if it is prepared; it prepares nothing.

    Raises:
        UserError: The vocabulary depends on data that is not prepared, or the split of the data is not possible.
    """
    if not config.resume:
        check_val_split(config.data)
    manifest = find_prepared(config.data, config.tokenizer)
    if manifest is not None:
        return config.with_vocabulary(manifest.vocab_size), manifest
    size = _vocabulary(config.tokenizer, config.data)
    return (config.with_vocabulary(size) if size is not None else config), None


def _vocabulary(tokenizer: TokenizerConfig, data: DataConfig) -> int | None:
    match tokenizer.name:
        case "bytes":
            return BytesTokenizer.vocab_size
        case "gpt2":
            return GPT2Tokenizer.vocab_size
        case "bpe":
            return tokenizer.vocab_size
    if data.corpus == "shakespeare":
        return 65  # characters of tinyshakespeare
    raise UserError(
        f"The vocabulary of tokenizer={tokenizer.name} is that of its text, which is not prepared: python -m "
        "gptlab.prepare with the same data= and tokenizer= does that."
    )
