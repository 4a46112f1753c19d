"""How a corpus is split into train and val: by whole documents or, one single text, at its end. Imports no torch."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from gptlab.data.config import DataConfig
from gptlab.data.shards.manifest import Split
from gptlab.data.sources.corpora import Corpus, Task, has_several_documents, is_missing, names_of_documents
from gptlab.data.sources.readers import Document
from gptlab.errors import UserError

DRAWS = 2**64  # a document draws a whole number below this


def resolve_val_split(config: DataConfig) -> DataConfig:
    """Replace ``data.val_split=auto`` by "tail" for a single document and by "documents" for several.

    It stays where the source is missing, which opening the corpus reports.
    """
    if config.val_split != "auto" or is_missing(config):
        return config
    return config.model_copy(update={"val_split": "documents" if has_several_documents(config) else "tail"})


def check_val_split(config: DataConfig) -> None:
    """Refuse ``data.val_split=tail`` for several documents, each of which would be split in two.

    Raises:
        UserError: There are several documents, or a file of records is damaged.
    """
    if config.val_split == "tail" and not is_missing(config) and has_several_documents(config):
        origin = config.source or config.path or f"data={config.corpus}"
        raise UserError(
            f"data.val_split=tail needs a single document, but {origin} has several, and each would be split in two. "
            "Use data.val_split=documents."
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
    for name in names_of_documents(corpus, tasks):
        drawn = draw(name, config.split_seed)
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


def draw(name: str, seed: int) -> int:
    """Return what a document draws, from its name and ``data.split_seed`` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8])


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
