"""Configuration of the corpus and of the tokenizer."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptlab.config.base import FrozenConfig


class DataConfig(FrozenConfig):
    """Corpus, and how it is split, stored and ordered.

    Attributes:
        corpus: The reader: see ``gptlab.data.sources.corpora``.
        source: A file or folder (text, shakespeare): .parquet and .jsonl hold records, all else is text; .gz and .zst
            are decompressed.
        path: Prepared shards: a folder, its URL, or a glob of others' token files (shards); the name of a data set on
            the Hugging Face hub, or its folder (huggingface).
        subset: The hub data set's configuration, where it has several.
        streaming: Read the data set as it comes instead of storing it first (huggingface).
        column: The column or field that holds the text (huggingface, .parquet, .jsonl).
        cache_dir: Where prepared shards are kept and looked for.
        val_split: "documents" gives whole documents to val, drawn by a hash of their names, and at least one; "tail"
            gives it the end of one single text; "auto" is "tail" for one single text and "documents" for all else.
        val_fraction: Share of val: of the documents, or of the characters of the text.
        split_seed: Chooses the documents of val.
        separator: Whether the end of text stands after each document or before it.
        undecodable: What becomes of bytes that are no UTF-8: "replace" by U+FFFD, or "refuse" the file.
        task_bytes: Text, at most, that is tokenized at a time and makes a shard of each split; bounds the memory that a
            worker needs.
        documents: "packed": a sequence is what follows in the stream; "masked": attention does not reach back beyond
            the last end of text, and positions count from it.
        order: "shuffled" anew each epoch; "sequential" as the corpus has them; "block" shuffles the shards, and the
            windows of so many at a time, so that few are in use.
        block_shards: Shards whose windows ``order=block`` shuffles together.
        cache_limit_gb: Of remote shards (path is a URL), how much of this machine's disk they may take.
        limit_windows: Train on the first so many windows only (``debug=overfit``).
        num_workers: Processes that prepare batches ahead; 0 prepares them in the training process. The batches are the
            same.
    """

    corpus: Literal["python_stdlib", "shakespeare", "shakespeare_plays", "text", "huggingface", "shards"]
    source: str | None
    path: str | None
    subset: str | None
    streaming: bool
    column: str | None
    cache_dir: str
    val_split: Literal["auto", "documents", "tail"]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: int
    separator: Literal["after", "before"]
    undecodable: Literal["replace", "refuse"]
    task_bytes: PositiveInt
    documents: Literal["packed", "masked"]
    order: Literal["shuffled", "sequential", "block"]
    block_shards: PositiveInt
    cache_limit_gb: PositiveFloat
    limit_windows: PositiveInt | None
    num_workers: NonNegativeInt

    @property
    def is_remote(self) -> bool:
        """Whether the shards are behind a URL."""
        return self.corpus == "shards" and self.path is not None and "://" in self.path


class TokenizerConfig(FrozenConfig):
    """Tokenizer.

    Attributes:
        name: "bytes" (UTF-8 bytes and an end-of-text id), "characters" (the corpus' own characters), "gpt2" (BPE) or
            "bpe" (trained on the corpus).
        vocab_dir: Folder with GPT-2's vocab.bpe and encoder.json, looked in first.
        vocab_size: Of "bpe": ids, the end of text included; None for the others, where it follows.
        train_mb: Of "bpe": text that it is trained on, from all over the corpus; None for the others.
    """

    name: Literal["bytes", "characters", "gpt2", "bpe"]
    vocab_dir: str | None
    vocab_size: Annotated[int, Field(gt=257)] | None
    train_mb: PositiveFloat | None

    @model_validator(mode="after")
    def _bpe_is_trained(self) -> Self:
        if self.name == "bpe" and (self.vocab_size is None or self.train_mb is None):
            raise ValueError("tokenizer=bpe needs a size and text to train on: vocab_size=4096 and train_mb=1000")
        return self
