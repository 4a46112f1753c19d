"""Corpus that a model is scored on, in the model's own tokens. Imports no torch."""

import json
import logging
from typing import Any, NamedTuple

from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.data.prepare.splitting import check_val_split
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.manifest import load_manifest
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.errors import UserError
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.launch.prepare_data import prepare_with_progress
from gptlab.pretrained.source import ModelSource
from gptlab.tracking.run_directory import load_config

log = logging.getLogger(__name__)


class ScoredCorpus(NamedTuple):
    """Corpus to score.

    Attributes:
        prepared: The data.
        eot_id: Id that separates documents; None if each window is read as one text.
    """

    prepared: TokenDataset
    eot_id: int | None


def open_scored_corpus(config: EvaluateConfig, source: ModelSource, *, tokenizer_is_named: bool) -> ScoredCorpus:
    """Prepares the corpus to score: the one that is configured, or the run's training data.

    It is prepared in the model's own tokenizer, since a model has a loss in no other: a BPE or a table of characters is
    taken from the model, not made of this corpus. A run that was trained within documents is scored within them.

    Args:
        config: Names the corpus.
        source: The model.
        tokenizer_is_named: Whether a tokenizer stands on the command line, and not just in an option of ``data``.

    Raises:
        UserError: No corpus is named, it cannot be had or split so, or it holds other tokens than the model's.
    """
    model = source.tokenizer()
    record = model.record()
    if tokenizer_is_named and config.tokenizer is not None and config.tokenizer.name != record["name"]:
        raise UserError(
            f"tokenizer={config.tokenizer.name} is not that of {config.run}, which is {record['name']}: a model has a "
            "loss in its own tokens alone. Leave it out."
        )
    run = load_config(source.path) if source.is_run else None
    if config.data is None:
        if run is None:
            raise UserError(
                f"run={config.run} was not trained here, so nothing says what it is to be scored on. Name a corpus: "
                "data=openwebtext, data=text data.source=<file> split=all; or tasks=[...], or hellaswag=<file>."
            )
        data, tokenizer, trained = run.data, run.tokenizer, None
    else:
        check_val_split(config.data)
        data, tokenizer = config.data, _tokenizer_settings(record, source, config.tokenizer)
        trained = model if record["name"] in ("characters", "bpe") else None
    prepared = prepare_with_progress(data, tokenizer, PrepareOptions(), trained)
    if not _are_equivalent(prepared.manifest.tokenizer, record):
        raise UserError(
            f"{prepared.manifest.origin} is prepared in other tokens (tokenizer="
            f"{prepared.manifest.tokenizer['name']}) than those of {config.run} (tokenizer={record['name']}, "
            f"{model.vocab_size:,} ids), so its ids mean nothing to the model."
        )
    if config.data is None and load_manifest(source.path).fingerprint() != prepared.manifest.fingerprint():
        log.warning("%s is not any more what %s was trained on.", prepared.manifest.origin, config.run)
    masked = "masked" in {data.documents, run.data.documents if run else data.documents}
    return ScoredCorpus(prepared, _eot_id(prepared, data) if masked else None)


def _tokenizer_settings(record: dict[str, str], source: ModelSource, named: TokenizerConfig | None) -> TokenizerConfig:
    """Settings that mean the model's tokenizer; of one that was trained, the size and the text do not matter here."""
    vocab_dir = (named.vocab_dir if named else None) or source.vocab_dir
    made = {"vocab_size": source.model.vocab_size, "train_mb": 1.0} if record["name"] == "bpe" else {}
    values = {"name": record["name"], "vocab_dir": vocab_dir, "vocab_size": None, "train_mb": None, **made}
    return TokenizerConfig.model_validate(values)


def _are_equivalent(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records give the same ids; a BPE that went through another program's files is spelled otherwise."""
    if one == other or (one["name"], other["name"]) != ("bpe", "bpe"):
        return one == other
    pieces = [json.loads(record["trained"])["model"] for record in (one, other)]
    return all(pieces[0][key] == pieces[1][key] for key in ("vocab", "merges"))


def _eot_id(prepared: TokenDataset, data: DataConfig) -> int | None:
    if prepared.tokenizer.end_of_text is None:
        raise UserError(
            f"data.documents={data.documents}: the tokenizer has no end of text that documents could be told apart by."
        )
    return prepared.tokenizer.end_of_text
