"""Split of a corpus into train and val: by documents or, for a single text, at its end. Imports no torch."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gptlab.data.config import DataConfig
from gptlab.data.shards.manifest import Split
from gptlab.data.sources.corpora import Corpus, Task, list_files, open_corpus
from gptlab.data.sources.readers import Document, file_kind
from gptlab.errors import UserError

HASH_RANGE = 2**64  # a document draws a whole number below this


def has_several_documents(config: DataConfig) -> bool:
    """Whether a corpus has more than one document. Of a file of records two are read, and else nothing.

    Raises:
        UserError: A file of records is damaged, or does not have the column.
    """
    if config.corpus != "text":
        return config.corpus in ("python_stdlib", "shakespeare_plays", "huggingface")
    source = Path(config.source or "").expanduser()
    paths = list_files(source, "*", set()) if source.is_dir() else iter([source])
    files = list(islice((path for path in paths if path.is_file() and path.stat().st_size), 2))
    if len(files) != 1 or file_kind(files[0]) == "text":
        return len(files) > 1
    corpus = open_corpus(config)
    return len(set(islice(_document_names(corpus, corpus.tasks(config.task_bytes)), 2))) > 1


def resolve_val_split(config: DataConfig) -> DataConfig:
    """Replaces ``data.val_split=auto`` by "tail" for a single document and by "documents" for several.

    It stays where the source is missing, which opening the corpus reports.
    """
    if config.val_split != "auto" or _is_missing(config):
        return config
    return config.model_copy(update={"val_split": "documents" if has_several_documents(config) else "tail"})


def check_val_split(config: DataConfig) -> None:
    """Refuses ``data.val_split=tail`` for several documents, each of which would be split in two.

    Raises:
        UserError: There are several documents, or a file of records is damaged.
    """
    if config.val_split == "tail" and not _is_missing(config) and has_several_documents(config):
        origin = config.source or config.path or f"data={config.corpus}"
        raise UserError(
            f"data.val_split=tail needs a single document, but {origin} has several, and each would be split in two. "
            "Use data.val_split=documents."
        )


def val_threshold(config: DataConfig, corpus: Corpus, tasks: list[Task]) -> float | None:
    """Returns the number below which a document's draw puts it in val, or None for ``val_split=tail``.

    It is ``val_fraction`` of all draws, except where that leaves a split empty, as it may with few documents: then the
    document with the smallest draw goes to val, or the one with the largest to train. As many documents are read as it
    takes to find one of each split, about 1 / val_fraction.

    Args:
        config: With a resolved ``val_split``.
        corpus: Its documents.
        tasks: All tasks of the corpus, in order.

    Raises:
        UserError: There are not two documents with text.
    """
    if config.val_split == "tail":
        return None
    threshold = config.val_fraction * HASH_RANGE
    smallest, largest = HASH_RANGE, -1
    for name in _document_names(corpus, tasks):
        drawn = document_hash(name, config.split_seed)
        smallest, largest = min(smallest, drawn), max(largest, drawn)
        if smallest < threshold <= largest:
            return threshold
    if smallest >= largest:
        number = "no" if largest < 0 else "only one"
        hint = "" if largest < 0 or config.corpus == "huggingface" else " Use data.val_split=tail to split it."
        raise UserError(
            f"data.val_split=documents: {corpus.origin} holds {number} document with text, and train and val need one "
            f"each.{hint}"
        )
    return smallest + 1 if smallest >= threshold else largest


def document_hash(name: str, seed: int) -> int:
    """Returns what a document draws, from its name and ``data.split_seed`` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8])


def _is_missing(config: DataConfig) -> bool:
    """Whether ``data=text`` names a file or folder that does not exist, or none."""
    return config.corpus == "text" and not (config.source and Path(config.source).expanduser().exists())


def _document_names(corpus: Corpus, tasks: list[Task]) -> Iterator[str]:
    """Yields the names of the documents that have text, in order, once for each part."""
    return (document.name for task in tasks for document in corpus.documents(task) if document.text)


class SplitPart(NamedTuple):
    """Part of a document that a split gets, and whether the document begins and ends with it."""

    split: Split
    text: str
    begins: bool
    finishes: bool


def split_document(document: Document, val_fraction: float, seed: int, threshold: float | None) -> Iterator[SplitPart]:
    """Yields a document for train or val by its draw or, without a threshold, its two parts for both."""
    name, text, begin, end, _ = document
    if threshold is not None:
        yield SplitPart("val" if document_hash(name, seed) < threshold else "train", text, begin == 0, end == 1)
        return
    boundary = 1 - val_fraction
    # in characters of a whole document; of a part of one, by the part's share of the bytes
    cut = int(len(text) * ((boundary - begin) / (end - begin)))
    # if train began in an earlier part, it ends in this one with at least one character
    cut = min(max(cut, int(0 < begin < boundary)), len(text))
    if begin < boundary:
        yield SplitPart("train", text[:cut], begin == 0, boundary <= end)
    if boundary < end:
        yield SplitPart("val", text[cut:], begin <= boundary, end == 1)
