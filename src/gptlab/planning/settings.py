"""Config keys of ``gptlab.plan`` in addition to those of a run. Imports no torch."""

from typing import Annotated

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveFloat

from gptlab.config.base import FrozenConfig, validate
from gptlab.config.resolve import resolve, resolve_to_dict
from gptlab.config.schema import RunConfig
from gptlab.data.config import ComponentTokenizerConfig, DataConfig, TokenizerConfig
from gptlab.data.prepare.prepare import find_prepared
from gptlab.data.prepare.splitting import check_val_split
from gptlab.data.shards.manifest import Manifest
from gptlab.data.tokenizers.tokenizer import BytesTokenizer, GPT2Tokenizer, build_tokenizer
from gptlab.errors import UserError


class PlanConfig(FrozenConfig):
    """Config keys of a plan; see conf/plan.yaml."""

    gpu: list[str] | str | None
    mfu: Annotated[float, Field(gt=0, le=1)]
    network_bandwidth: PositiveFloat | None
    budget: PositiveFloat | None
    calibrate: bool
    json_file: Annotated[str | None, Field(alias="json")]
    overwrite: bool

    @property
    def gpus(self) -> list[str]:
        """Names of the GPUs, as a list."""
        return [self.gpu] if isinstance(self.gpu, str) else list(self.gpu or ())

    @property
    def bandwidth(self) -> float | None:
        """Bandwidth of the network in bytes per second."""
        return None if self.network_bandwidth is None else self.network_bandwidth * 1e9


KEYS = ("gpu", "mfu", "network_bandwidth", "budget", "calibrate", "json", "overwrite")


def resolve_plan(values: DictConfig, overrides: list[str]) -> tuple[RunConfig, PlanConfig]:
    """Resolves and validates a composed config; returns the config of the run and that of the plan."""
    run = OmegaConf.masked_copy(values, [str(key) for key in values if key not in KEYS])
    plan = OmegaConf.masked_copy(values, list(KEYS))
    return resolve(run, run_overrides(overrides)), validate(PlanConfig, resolve_to_dict(plan))


def run_overrides(overrides: list[str]) -> list[str]:
    """Returns the overrides of the run, without those of the plan."""
    return [override for override in overrides if override.lstrip("+").partition("=")[0] not in KEYS]


def with_vocabulary(config: RunConfig) -> tuple[RunConfig, Manifest | None]:
    """Sets the vocabulary size of a configuration, and returns the manifest of its data if that is prepared.

    Raises:
        UserError: The vocabulary size depends on data that is not prepared, or the val split is not possible.
    """
    if not config.resume:
        check_val_split(config.data)
    manifest = find_prepared(config.data, config.tokenizer)
    if manifest is not None:
        return config.with_vocabulary(manifest.vocab_size), manifest
    size = _vocabulary(config.tokenizer, config.data)
    return (config.with_vocabulary(size) if size is not None else config), None


def _vocabulary(tokenizer: TokenizerConfig, data: DataConfig) -> int | None:
    if isinstance(tokenizer, ComponentTokenizerConfig) or tokenizer.name == "file":
        return build_tokenizer(tokenizer, ()).vocab_size
    match tokenizer.name:
        case "bytes":
            return BytesTokenizer.vocab_size
        case "gpt2":
            return GPT2Tokenizer.vocab_size
        case "bpe":
            return tokenizer.vocab_size
    if data.corpus == "shakespeare":
        return 65  # distinct characters of tinyshakespeare
    raise UserError(
        f"The vocabulary size of tokenizer={tokenizer.name} is unknown because the data is not prepared. Run python -m "
        "gptlab.prepare with the same data and tokenizer overrides first."
    )
