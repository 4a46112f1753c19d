"""Data preparation with a progress bar, and the output of gptlab.prepare. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from rich import box
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gptlab.config.base import FrozenConfig
from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.formats import Format
from gptlab.data.shards.manifest import SPLITS, Manifest, load_manifest
from gptlab.data.shards.open_shards import find_shards
from gptlab.data.shards.streams import ShardStore
from gptlab.data.shards.token_dataset import TokenDataset, first_documents, longest_document
from gptlab.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from gptlab.tables import FittingTable, print_table
from gptlab.terminal import get_console


def stored_tokenizer(run_dir: Path, config: TokenizerConfig) -> Tokenizer | None:
    """Builds the tokenizer of a run from its manifest if it is one of a file; returns None for others."""
    return load_tokenizer(load_manifest(run_dir).tokenizer, None, run_dir) if config.name == "file" else None


def prepare_with_progress(
    data: DataConfig, tokenizer: TokenizerConfig, work: PrepareOptions, trained: Tokenizer | None = None
) -> TokenDataset:
    """Calls ``gptlab.data.prepare.prepare.prepare``, which has the same arguments, with a progress bar.

    Raises:
        UserError: The data cannot be prepared; see ``prepare``.
    """
    with _progress_bar() as bar:
        task = bar.add_task("", total=None, visible=False, tokens=0, speed="–", earlier=None)

        def report(done: int, of: int, tokens: int) -> None:
            if (earlier := bar.tasks[task].fields["earlier"]) is None:  # first call: bytes of a resumed preparation
                bar.reset(task, completed=done, total=of, visible=True, tokens=tokens, speed="–", earlier=done)
                return
            speed = (done - earlier) / (bar.tasks[task].elapsed or 1e-9) / 1e6
            bar.update(task, completed=done, tokens=tokens, speed=f"{speed:.1f}")

        return prepare(data, tokenizer, work._replace(report=report), trained)


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    columns = (
        TextColumn("preparing"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}% · {task.fields[speed]} MB/s · {task.fields[tokens]:,} tokens ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=get_console(), transient=True) as bar:
        yield bar


class WorkConfig(FrozenConfig):
    """Number of worker processes and machines for data preparation.

    See ``gptlab.data.prepare.tasks.PrepareOptions``.
    """

    workers: Annotated[PositiveInt, Field(le=1024)] | None
    part: NonNegativeInt
    parts: PositiveInt

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        if self.part >= self.parts:
            raise ValueError(f"prepare.part={self.part} must be less than prepare.parts={self.parts}")
        return self


class PrepareCommand(FrozenConfig):
    """Config of ``python -m gptlab.prepare``; see conf/prepare.yaml."""

    data: DataConfig
    tokenizer: TokenizerConfig
    prepare: WorkConfig
    merge: bool
    inspect: str | None
    verify: bool
    replay: str | None
    step: PositiveInt
    convert: str | None
    format: Format
    out: str | None
    overwrite: bool


def find_existing_shards(config: PrepareCommand, key: str, path: str) -> tuple[ShardStore, Manifest]:
    """Finds prepared shards (local or remote) or token files of other programs. Does not build their tokenizer.

    Args:
        config: Configuration of the command.
        key: Key of the command that has the path, for messages.
        path: Prepared directory, its URL, or a glob of token files.

    Raises:
        UserError: The shards cannot be opened; see ``gptlab.data.shards.open_shards.open_shards``.
    """
    data = config.data.model_copy(update={"corpus": "shards", "path": path})
    return find_shards(data, config.tokenizer, key)


def print_prepared(prepared: TokenDataset) -> None:
    """Prints a summary of prepared data and the beginning of each of its first training documents."""
    manifest, console = prepared.manifest, get_console()
    table = FittingTable()
    table.add_column()
    for column, order in (
        *(("shards", 1), ("tokens", None), ("documents", None)),
        *(("MB of text", 4), ("bytes per token", 3), ("longest document", 2)),
    ):
        table.add_column(column, "right", drop_order=order)
    for split in SPLITS:
        shards = manifest.splits[split]
        tokens, text = manifest.tokens(split), manifest.bytes(split)
        longest = longest_document(prepared.stream(split), prepared.tokenizer.end_of_text)
        documents = sum(shard.documents for shard in shards)
        numbers = (len(shards), tokens, documents)
        table.add_row(
            split, *(f"{number:,}" for number in numbers), f"{text / 1e6:,.1f}", f"{text / tokens:.3f}", f"{longest:,}"
        )
    tokenizer = f"tokenizer {manifest.tokenizer['name']}, {manifest.vocab_size:,} token IDs, {manifest.dtype}"
    console.print(f"{manifest.origin}\n{tokenizer}", markup=False)
    print_table(table)
    for beginning in first_documents(prepared, "train", documents=3, tokens=60):
        title = "beginning of a training document"
        console.print(Panel(Text(beginning), box=box.ROUNDED, title=title, title_align="left"))
    console.print(f"Prepared: {prepared.folder}", soft_wrap=True, markup=False)


def print_batch(windows: list[tuple[int, str]]) -> None:
    """Prints the windows of a global batch.

    Args:
        windows: Offset of the first token in the stream, and text, of each window.
    """
    for number, (start, text) in enumerate(windows):
        title = f"window {number}, starting at token {start:,}"
        get_console().print(Panel(Text(text), box=box.ROUNDED, title=title, title_align="left"))
