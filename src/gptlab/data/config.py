"""Which text, in which tokens."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from gptlab.settings import Settings


class DataConfig(Settings):
    """A corpus and how it is split, stored and ordered.

    Attributes:
        corpus: The reader: see ``gptlab.data.corpora``.
        source: A file or folder (text, shakespeare): .parquet and .jsonl hold records, all else is text; .gz and .zst
            are decompressed.
        path: Prepared shards, as a glob (shards); the name of a data set on the Hugging Face hub (huggingface).
        subset: The hub data set's configuration, where it has several.
        column: The column or field that holds the text (huggingface, .parquet, .jsonl).
        cache_dir: Where prepared shards are kept and looked for.
        val_split: "documents" gives whole documents to val, chosen by a hash of their names; "tail" gives it the end of
            every document.
        val_fraction: Share of val: of the documents, or of the characters of each.
        split_seed: Chooses the documents of val.
        separator: Whether the end of text stands after each document or before it.
        undecodable: What becomes of bytes that are no UTF-8: "replace" by U+FFFD, or "refuse" the file.
        task_bytes: Text that is tokenized at a time and makes a shard of each split; bounds the memory a worker needs.
        order: "shuffled" anew each epoch; "sequential" as the corpus has them; "block" shuffles blocks of neighbours,
            and the windows inside each, so that few shards are in use at a time.
        limit_windows: Train on the first so many windows only (``debug=overfit``).
        num_workers: Processes that prepare batches ahead; 0 prepares them in the training process. The batches are the
            same.
    """

    corpus: Literal["python_stdlib", "shakespeare", "shakespeare_plays", "text", "huggingface", "shards"]
    source: str | None
    path: str | None
    subset: str | None
    column: str | None
    cache_dir: str
    val_split: Literal["documents", "tail"]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: int
    separator: Literal["after", "before"]
    undecodable: Literal["replace", "refuse"]
    task_bytes: PositiveInt
    order: Literal["shuffled", "sequential", "block"]
    limit_windows: PositiveInt | None
    num_workers: NonNegativeInt


class TokenizerConfig(Settings):
    """A tokenizer by name.

    Attributes:
        name: "bytes" (UTF-8 bytes and an end-of-text id), "characters" (the corpus' own characters), "gpt2" (BPE) or
            "bpe" (trained on the corpus).
        vocab_dir: Folder with GPT-2's vocab.bpe and encoder.json, looked in first.
        vocab_size: Of "bpe": ids, the end of text included; None for the others, where it follows.
    """

    name: Literal["bytes", "characters", "gpt2", "bpe"]
    vocab_dir: str | None
    vocab_size: Annotated[int, Field(gt=257)] | None
