"""Train/val split of a corpus: by document, or the end of a single text. Imports no torch."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gptlab.data.config import DataConfig
from gptlab.data.shards.manifest import Split
from gptlab.data.sources.corpora import open_corpus
from gptlab.data.sources.files import Corpus, FileCorpus, Task
from gptlab.data.sources.readers import Document
from gptlab.errors import UserError
from gptlab.progress import track_reading

HASH_RANGE = 2**64  # document hashes are integers in [0, HASH_RANGE)


def has_several_documents(config: DataConfig) -> bool:
    """Returns whether a corpus has more than one document. Reads at most two records, and no plain text.

    A component is assumed to have several documents with ``data.val_split=auto``, without running it.

    Raises:
        UserError: A file of records is damaged or lacks the column.
    """
    if config.corpus == "component":
        return config.val_split == "auto" or _names_differ(config)
    if config.corpus != "text":
        return config.corpus in ("python_stdlib", "shakespeare_plays", "huggingface")
    corpus = open_corpus(config)
    files = list(islice(corpus.typed_files(), 2)) if isinstance(corpus, FileCorpus) else []
    if len(files) != 1 or files[0][1].format == "text":
        return len(files) > 1
    return _names_differ(config)


def resolve_val_split(config: DataConfig) -> DataConfig:
    """Replaces ``data.val_split=auto`` with "tail" for a single document and with "documents" for several.

    Keeps "auto" if the source is missing. Opening the corpus reports that error.
    """
    if config.val_split != "auto" or _is_missing(config):
        return config
    return config.model_copy(update={"val_split": "documents" if has_several_documents(config) else "tail"})


def without_split(config: DataConfig) -> DataConfig:
    """Returns the config with which the whole corpus becomes val, in order, with each document after an end of text.

    The first token of a model's text has no context, so that it could not be scored without an end of text before it.
    Existing shards keep their splits.
    """
    whole = {"val_split": "documents", "val_fraction": 1.0, "separator": "before"}
    return config if config.corpus == "shards" else config.model_copy(update=whole)


def check_val_split(config: DataConfig) -> None:
    """Checks that ``data.val_split=tail`` is used only with a single document, because it would split each document.

    Raises:
        UserError: ``val_split`` is "tail" and there are several documents, or a file of records is damaged.
    """
    if config.val_split == "tail" and not _is_missing(config) and has_several_documents(config):
        origin = config.source or config.path or f"data={config.corpus}"
        raise UserError(
            f"data.val_split=tail requires a single document, but {origin} has several, and each would be split in "
            "two. Use data.val_split=documents."
        )


def val_threshold(config: DataConfig, corpus: Corpus, tasks: list[Task]) -> float | None:
    """Returns the hash below which a document is assigned to val, or None for ``val_split=tail``.

    The threshold is ``val_fraction * HASH_RANGE``. If that would leave a split empty, as it may with few documents, the
    document with the smallest hash is assigned to val, or the one with the largest hash to train. Documents are read
    until one of each split is found, about 1 / val_fraction of them.

    Args:
        config: Config of the data, with a resolved ``val_split``.
        corpus: The corpus.
        tasks: All tasks of the corpus, in order.

    Raises:
        UserError: Fewer than two documents have text.
    """
    if config.val_split == "tail":
        return None
    threshold = config.val_fraction * HASH_RANGE
    if config.val_fraction == 1:
        return threshold
    smallest, largest = HASH_RANGE, -1
    with track_reading("Splitting documents", corpus.bytes) as advance:
        for document in _documents_with_text(corpus, tasks):
            advance(len(document.text))
            drawn = document_hash(document.name, config.split_seed)
            smallest, largest = min(smallest, drawn), max(largest, drawn)
            if smallest < threshold <= largest:
                return threshold
    if smallest >= largest:
        number = "no" if largest < 0 else "only one"
        hint = "" if largest < 0 or config.corpus == "huggingface" else " Use data.val_split=tail to split it."
        raise UserError(
            f"data.val_split=documents requires one document with text for each of train and val, but {corpus.origin} "
            f"has {number} document with text.{hint}"
        )
    return smallest + 1 if smallest >= threshold else largest


def document_hash(name: str, seed: int) -> int:
    """Returns the hash of a document, in [0, HASH_RANGE), from its name and ``data.split_seed``."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode(errors="surrogateescape")).digest()[:8])


def _is_missing(config: DataConfig) -> bool:
    """Returns whether the source of ``data=text`` is not set or does not exist."""
    return config.corpus == "text" and not (config.source and Path(config.source).expanduser().exists())


def _names_differ(config: DataConfig) -> bool:
    """Returns whether the first two documents with text are different documents."""
    corpus = open_corpus(config)
    first = islice(_documents_with_text(corpus, corpus.tasks(config.task_bytes)), 2)
    return len({document.name for document in first}) > 1


def _documents_with_text(corpus: Corpus, tasks: list[Task]) -> Iterator[Document]:
    """Yields the documents that have text, in order; a divided document in several parts."""
    return (document for task in tasks for document in corpus.documents(task) if document.text)


class SplitPart(NamedTuple):
    """Part of a document that is assigned to a split.

    Attributes:
        split: The split.
        text: The text.
        begins: Whether it is preceded by the end-of-text token, with ``data.separator=before``.
        finishes: Whether it is followed by the end-of-text token, with ``data.separator=after``.
        is_last: Whether the split has no further part of the document.
    """

    split: Split
    text: str
    begins: bool
    finishes: bool
    is_last: bool


def split_document(document: Document, config: DataConfig, threshold: float | None) -> Iterator[SplitPart]:
    """Yields the parts of a document: one for train or val by its hash, or without a threshold one for each.

    Args:
        document: A document, or a part of one.
        config: Config of the data.
        threshold: Result of ``val_threshold``.
    """
    name, text, begin, end, _ = document
    if threshold is not None:
        split: Split = "val" if document_hash(name, config.split_seed) < threshold else "train"
        yield SplitPart(split, text, begin == 0, end == 1, end == 1)
        return
    boundary = 1 - config.val_fraction
    # The boundary is in characters of the document; begin and end of a part are fractions of its bytes.
    cut = int(len(text) * ((boundary - begin) / (end - begin)))
    # If train began in an earlier part, at least one character of this part ends it.
    cut = min(max(cut, int(0 < begin < boundary)), len(text))
    if begin < boundary:
        yield SplitPart("train", text[:cut], begin == 0, boundary <= end and config.end_at_cut, boundary <= end)
    if boundary < end:
        yield SplitPart("val", text[cut:], begin <= boundary and config.end_at_cut, end == 1, end == 1)
