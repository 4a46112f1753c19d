"""Config groups ``data`` and ``tokenizer``."""

from typing import Annotated, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from gptlab.config.base import ComponentConfig, FrozenConfig, Location, component_or_built_in
from gptlab.config.components import Component


class DataConfig(FrozenConfig):
    """Corpus, and how it is split, stored and ordered.

    Attributes:
        corpus: Name of the corpus; see ``gptlab.data.sources.corpora``.
        reader: Component that yields the documents, a ``gptlab.data.sources.component.DocumentReader`` (component).
        source: File or directory of the corpus (text, shakespeare). Parquet and .jsonl files are read as records. Text
            and .jsonl files can be compressed; see ``gptlab.data.sources.file_types``.
        path: Prepared shards: a directory, its URL, or a glob of token files of other programs (shards). Name of a
            dataset on the Hugging Face Hub, or its local directory (huggingface).
        subset: Configuration of the Hub dataset, if it has several (huggingface).
        streaming: Whether to stream the dataset instead of downloading it first (huggingface).
        column: Column or field that holds the text (huggingface, .parquet, .jsonl).
        cache_dir: Cache directory of prepared shards.
        val_split: "documents" assigns whole documents, at least one, to val by a hash of their names. "tail" assigns
            the end of a single text to val. "auto" means "tail" for a single text and "documents" otherwise.
        val_fraction: Fraction of the documents, or of the characters of a single text, that is assigned to val.
        split_seed: Seed that selects the documents of val.
        separator: Whether the end-of-text token is inserted after or before each document.
        end_at_cut: Whether the place where ``val_split=tail`` cuts a text gets an end-of-text token, too.
        undecodable: Handling of bytes that are not valid UTF-8: "replace" inserts U+FFFD, "refuse" raises an error.
        max_expansion: Maximum ratio of the decompressed to the compressed size of a file. Does not change the tokens.
        task_bytes: Maximum size, in bytes of text, of one tokenization task, which writes one shard per split. It
            bounds the memory of a worker.
        documents: "packed" lets attention cross document boundaries. "masked" restricts attention to the tokens since
            the last end-of-text token and restarts the positions there.
        order: "shuffled" reshuffles all windows every epoch. "sequential" keeps the order of the corpus. "block"
            shuffles the shards, then the windows of ``block_shards`` shards at a time, so that few shards are in use
            concurrently.
        block_shards: Number of shards whose windows ``order=block`` shuffles together.
        cache_limit_gb: Disk space, in GB, that remote shards (``path`` is a URL) may use on this machine.
        limit_windows: Trains on the first ``limit_windows`` windows only (``debug=overfit``). None uses all windows.
        num_workers: Processes that prefetch batches; 0 builds them in the training process. The batches are identical.
    """

    corpus: Literal["python_stdlib", "shakespeare", "shakespeare_plays", "text", "huggingface", "shards", "component"]
    reader: Component = None
    source: Annotated[str | None, Location]
    path: Annotated[str | None, Location]
    subset: str | None
    streaming: bool
    column: str | None
    cache_dir: Annotated[str, Location]
    val_split: Literal["auto", "documents", "tail"]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: int
    separator: Literal["after", "before"]
    end_at_cut: bool = True  # run directories of earlier versions do not have it
    undecodable: Literal["replace", "refuse"]
    max_expansion: PositiveFloat = 100.0  # run directories of earlier versions do not have it
    task_bytes: PositiveInt
    documents: Literal["packed", "masked"]
    order: Literal["shuffled", "sequential", "block"]
    block_shards: PositiveInt
    cache_limit_gb: PositiveFloat
    limit_windows: PositiveInt | None
    num_workers: Annotated[NonNegativeInt, Field(le=1024)]

    @model_validator(mode="after")
    def _reader_is_used(self) -> Self:
        if self.corpus == "component" and self.reader is None:
            raise ValueError("corpus=component requires data.reader, such as data.reader._target_=mylab.readers.Wiki")
        if self.corpus != "component" and self.reader is not None:
            target = self.reader["_target_"]  # without its arguments, which may contain secrets
            raise ValueError(f"reader._target_={target} is only used with data=component, not corpus={self.corpus}")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether the shards are read from a URL."""
        return self.corpus == "shards" and self.path is not None and "://" in self.path


class BuiltInTokenizerConfig(FrozenConfig):
    """Tokenizer of gptlab.

    Attributes:
        name: "bytes" (UTF-8 bytes and an end-of-text token), "characters" (the characters of the corpus), "gpt2" (BPE
            of GPT-2), "bpe" (BPE trained on the corpus) or "file" (tokenizer of ``path``).
        path: A tokenizer.json, a directory that has one, or a SentencePiece model (file).
        end_of_text: Special token that separates documents (file). None: the one that the files name.
        vocab_dir: Directory with GPT-2's vocab.bpe and encoder.json, which takes precedence over other locations.
        vocab_size: Number of token IDs of "bpe", including the end-of-text token. None for other tokenizers.
        train_mb: Megabytes of text, sampled from the whole corpus, on which "bpe" is trained. None for other
            tokenizers.
    """

    name: Literal["bytes", "characters", "gpt2", "bpe", "file"]
    path: Annotated[str | None, Location] = None  # run directories of earlier versions do not have it
    end_of_text: str | None = None  # likewise
    vocab_dir: Annotated[str | None, Location]
    vocab_size: Annotated[int, Field(gt=257)] | None
    train_mb: PositiveFloat | None

    @model_validator(mode="after")
    def _bpe_is_trained(self) -> Self:
        if self.name == "bpe" and (self.vocab_size is None or self.train_mb is None):
            raise ValueError(
                "tokenizer=bpe requires vocab_size and train_mb, for example vocab_size=4096 train_mb=1000"
            )
        return self

    @model_validator(mode="after")
    def _file_has_a_path(self) -> Self:
        if self.name == "file" and self.path is None:
            raise ValueError(
                "tokenizer=file requires tokenizer.path=<tokenizer.json, a directory that has one, or a SentencePiece "
                ".model>"
            )
        if self.name != "file" and (self.path or self.end_of_text):
            key = "path" if self.path else "end_of_text"
            raise ValueError(f"tokenizer.{key} is only used with tokenizer=file, not tokenizer={self.name}")
        return self


class ComponentTokenizerConfig(ComponentConfig):
    """Custom tokenizer, by ``_target_``: a ``gptlab.data.tokenizers.component.CustomTokenizer``.

    The other keys are its arguments.
    """

    @property
    def vocab_dir(self) -> None:
        """Directory of GPT-2's vocabulary, which such a tokenizer does not have."""
        return


TokenizerConfig = Annotated[
    Annotated[BuiltInTokenizerConfig, Tag("built_in")] | Annotated[ComponentTokenizerConfig, Tag("component")],
    Discriminator(component_or_built_in),
]
