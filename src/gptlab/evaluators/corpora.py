"""Corpus on which a model is scored, prepared with the tokenizer of the model. Imports no torch."""

import logging
from typing import Any, NamedTuple

from gptlab.config.locations import check_locations
from gptlab.config.trust import check_trusted
from gptlab.data.config import BuiltInTokenizerConfig, ComponentTokenizerConfig, DataConfig, TokenizerConfig
from gptlab.data.prepare.splitting import check_val_split, without_split
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.manifest import load_manifest
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.data.tokenizers.tokenizer import STORED
from gptlab.errors import UserError
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.launch.prepare_data import prepare_with_progress
from gptlab.parsing import parse_json
from gptlab.pretrained.source import ModelSource
from gptlab.tracking.run_directory import load_config

log = logging.getLogger(__name__)


class ScoredCorpus(NamedTuple):
    """Corpus to score.

    Attributes:
        prepared: The prepared data.
        eot_id: ID of the end-of-text token at which attention is masked, or None for packed documents.
    """

    prepared: TokenDataset
    eot_id: int | None


def open_scored_corpus(config: EvaluateConfig, source: ModelSource, *, tokenizer_is_named: bool) -> ScoredCorpus:
    """Prepares the corpus to score: the one in ``config``, or else the training data of the run.

    The corpus is tokenized with the tokenizer of the model: a trained BPE or a character vocabulary is taken from the
    model and not built from the corpus. If a run was trained with ``data.documents=masked``, it is also scored with
    masked documents.

    Args:
        config: Config of the evaluation.
        source: The model.
        tokenizer_is_named: Whether the command line, and not only an option of ``data``, sets a tokenizer.

    Raises:
        UserError: No corpus is set, it is missing or cannot be split, or its tokenizer is not that of the model.
    """
    model = source.tokenizer()
    record = model.record()
    if tokenizer_is_named and config.tokenizer is not None and config.tokenizer.name != record["name"]:
        raise UserError(
            f"tokenizer={config.tokenizer.name} differs from the tokenizer of {config.run}, which is {record['name']}. "
            f"A model can only be scored with its own tokenizer. Remove the override tokenizer={config.tokenizer.name}."
        )
    run = load_config(source.path) if source.is_run else None
    if config.data is None:
        if run is None:
            raise UserError(
                f"run={config.run} is not a gptlab run directory, so its training data is unknown. Set the corpus to "
                "score with data=openwebtext, or data=text data.source=<file> split=all, or use tasks=[...] or "
                "hellaswag=<file>."
            )
        check_trusted(run.model_dump(mode="json", include={"data", "tokenizer"}), config.run)
        check_locations(run, source.path, used=("data", "tokenizer"))
        data, tokenizer = run.data, run.tokenizer
        trained = model if record["name"] == "file" else None  # its path may have other content by now
    else:
        if config.split != "all":
            check_val_split(config.data)
        data, tokenizer = config.data, _tokenizer_settings(record, source, config.tokenizer)
        trained = model if record["name"] in STORED else None
    data = without_split(data) if config.split == "all" else data
    prepared = prepare_with_progress(data, tokenizer, PrepareOptions(), trained)
    if not _are_equivalent(prepared.manifest.tokenizer, record):
        raise UserError(
            f"{prepared.manifest.origin} was prepared with tokenizer={prepared.manifest.tokenizer['name']}, but "
            f"{config.run} uses a different one, tokenizer={record['name']} ({model.vocab_size:,} token IDs), so "
            f"{config.run} cannot be evaluated on it."
        )
    is_training_data = config.data is None and config.split != "all"
    if is_training_data and load_manifest(source.path).fingerprint() != prepared.manifest.fingerprint():
        log.warning("%s has changed since %s was trained on it.", prepared.manifest.origin, config.run)
    masked = "masked" in {data.documents, run.data.documents if run else data.documents}
    return ScoredCorpus(prepared, _eot_id(prepared, data) if masked else None)


def _tokenizer_settings(record: dict[str, Any], source: ModelSource, named: TokenizerConfig | None) -> TokenizerConfig:
    """Returns the config of the model's tokenizer. For a trained BPE, ``vocab_size`` and ``train_mb`` are not used."""
    if "component" in record:
        return ComponentTokenizerConfig.model_validate(record["component"])
    vocab_dir = (named.vocab_dir if named else None) or source.vocab_dir
    made: dict[str, Any] = {"vocab_size": source.model.vocab_size, "train_mb": 1.0} if record["name"] == "bpe" else {}
    made |= {"path": str(source.path)} if record["name"] == "file" else {}
    values = {"name": record["name"], "vocab_dir": vocab_dir, "vocab_size": None, "train_mb": None, **made}
    return BuiltInTokenizerConfig.model_validate(values)


def _are_equivalent(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records give the same token IDs. Files of other programs serialize the same BPE differently."""
    if one == other or (one["name"], other["name"]) != ("bpe", "bpe"):
        return one == other
    pieces = [parse_json(record["trained"])["model"] for record in (one, other)]
    return all(pieces[0][key] == pieces[1][key] for key in ("vocab", "merges"))


def _eot_id(prepared: TokenDataset, data: DataConfig) -> int | None:
    if prepared.tokenizer.end_of_text is None:
        raise UserError(
            f"data.documents={data.documents} requires an end-of-text token, which the tokenizer of the model lacks."
        )
    return prepared.tokenizer.end_of_text
