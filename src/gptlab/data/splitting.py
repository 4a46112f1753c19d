"""How a corpus is split into train and val: by whole documents or, one single text, at its end. Imports no torch."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from gptlab.data.config import DataConfig
from gptlab.data.corpora import Corpus, Task, is_missing, is_one_text, open_corpus
from gptlab.data.readers import Document
from gptlab.data.shards import Split
from gptlab.errors import UserError

DRAWS = 2**64  # a document draws a whole number below this


def resolve_val_split(config: DataConfig) -> DataConfig:
    """Replace ``data.val_split=auto`` by "tail" for one single text and by "documents" for all else.

    It stays where the source is missing, which opening the corpus reports.
    """
    if config.val_split != "auto" or is_missing(config):
        return config
    return config.model_copy(update={"val_split": "tail" if is_one_text(config) else "documents"})


def check_val_split(config: DataConfig) -> None:
    """Refuse ``data.val_split=tail`` for several documents, which a new run or preparation would cut one by one.

    Raises:
        UserError: There are several documents, or the corpus is missing or damaged.
    """
    if config.val_split != "tail" or config.corpus == "shards" or is_one_text(config):
        return
    if config.corpus == "huggingface":  # not loaded for this
        several, origin = True, f"data.path={config.path}"
    else:
        corpus = open_corpus(config)
        names = _names(corpus, corpus.tasks(config.task_bytes))
        first, origin = next(names, None), corpus.origin
        several = any(name != first for name in names)
    if several:
        raise UserError(
            f"data.val_split=tail would cut each document of {origin} in two: tail is for one single text. "
            "data.val_split=documents gives whole documents to val."
        )


def val_threshold(config: DataConfig, corpus: Corpus, tasks: list[Task]) -> float | None:
    """Return the number below which a document's draw puts it in val; None where each is cut (val_split=tail).

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
    threshold = config.val_fraction * DRAWS
    smallest, largest = DRAWS, -1
    for name in _names(corpus, tasks):
        drawn = draw(name, config.split_seed)
        smallest, largest = min(smallest, drawn), max(largest, drawn)
        if smallest < threshold <= largest:
            return threshold
    if smallest >= largest:
        number = "no" if largest < 0 else "only one"
        hint = "" if largest < 0 or config.corpus == "huggingface" else " data.val_split=tail would cut it in two."
        raise UserError(
            f"data.val_split=documents: {corpus.origin} holds {number} document with text, and train and val need one "
            f"each.{hint}"
        )
    return smallest + 1 if smallest >= threshold else largest


def draw(name: str, seed: int) -> int:
    """Return what a document draws, from its name and ``data.split_seed`` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8])


def _names(corpus: Corpus, tasks: list[Task]) -> Iterator[str]:
    """Yield the names of the documents that have text, in order, of each part where a document comes in several."""
    return (document.name for task in tasks for document in corpus.documents(task) if document.text)


class Part(NamedTuple):
    """What of a document a split gets, and whether that part begins and finishes there."""

    split: Split
    text: str
    begins: bool
    finishes: bool


def split_document(document: Document, val_fraction: float, seed: int, threshold: float | None) -> Iterator[Part]:
    """Give a document to train or val by its draw or, without a threshold, the two parts of it to both."""
    name, text, begin, end, _ = document
    if threshold is not None:
        yield Part("val" if draw(name, seed) < threshold else "train", text, begin == 0, end == 1)
        return
    border = 1 - val_fraction
    # of a whole document, a place counted in characters; of a part of one, where the border falls by its share of bytes
    cut = int(len(text) * ((border - begin) / (end - begin)))
    # where train began in a part before, it ends in this one, be it with one character
    cut = min(max(cut, int(0 < begin < border)), len(text))
    if begin < border:
        yield Part("train", text[:cut], begin == 0, border <= end)
    if border < end:
        yield Part("val", text[cut:], begin <= border, end == 1)
