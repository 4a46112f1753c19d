"""Which text, in which tokens."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from gptlab.settings import Settings


class DataConfig(Settings):
    """A corpus and how it is split, stored and ordered.

    Attributes:
        corpus: The reader: see ``gptlab.data.corpora``.
        source: A file or folder of text (text, shakespeare).
        path: Prepared shards, as a glob (shards); the name of a data set on the Hugging Face hub (huggingface).
        subset: The hub data set's configuration, where it has several.
        column: The hub data set's column that holds the text.
        cache_dir: Where prepared shards are kept and looked for.
        val_split: "documents" gives whole documents to val, chosen by a hash of their names; "tail" gives it the end of
            every document.
        val_fraction: Share of val: of the documents, or of the characters of each.
        split_seed: Chooses the documents of val.
        shard_tokens: A shard is closed at the first document end after this many tokens.
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
    shard_tokens: PositiveInt
    limit_windows: PositiveInt | None
    num_workers: NonNegativeInt


class TokenizerConfig(Settings):
    """A tokenizer by name.

    Attributes:
        name: "bytes" (UTF-8 bytes and an end-of-text id), "characters" (the corpus' own characters) or "gpt2" (BPE).
        vocab_dir: Folder with GPT-2's vocab.bpe and encoder.json, looked in first.
    """

    name: Literal["bytes", "characters", "gpt2"]
    vocab_dir: str | None
