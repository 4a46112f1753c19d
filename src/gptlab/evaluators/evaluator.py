"""The scoring itself: a model on a corpus, and on HellaSwag."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptlab.data.shards.manifest import SPLITS
from gptlab.errors import UserError
from gptlab.evaluation.completions import AccuracyCounts, count_correct, ending_losses, rank_batches
from gptlab.evaluation.corpus import WindowBatches, accumulate_losses, cut_windows
from gptlab.evaluation.hellaswag import Example
from gptlab.evaluation.loss import LossSums
from gptlab.evaluators.context import EvalContext
from gptlab.evaluators.corpora import ScoredCorpus
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.model.gpt import GPT
from gptlab.training.hardware import resolve_loss_chunk

T = TypeVar("T")


class EvalResult(NamedTuple):
    """What an evaluation has found.

    Attributes:
        what: "loss", "hellaswag" or "tasks".
        values: Plain data, for the file.
        metrics: Its numbers by name, for a logger.
        rows: For the table: a line of cells each, the first of them the heading.
    """

    what: str
    values: dict[str, Any]
    metrics: dict[str, float]
    rows: Sequence[tuple[str, ...]]


def evaluate_corpus(model: GPT, corpus: ScoredCorpus, config: EvaluateConfig, machine: EvalContext) -> EvalResult:
    """Score a model on the split of a corpus that is asked for; every process gets the numbers of all of them."""
    prepared, block_size = corpus.prepared, model.config.block_size
    stride = config.stride or block_size
    sums = LossSums(torch.from_numpy(prepared.tokenizer.token_bytes()).to(machine.device))
    splits = SPLITS if config.split == "all" else (config.split,)
    parts, begun = [], time.perf_counter()
    for split in splits:
        stream = prepared.stream(split)
        try:
            windows = cut_windows(len(stream), block_size, stride, config.windows)
        except ValueError as error:
            raise UserError(f"{prepared.manifest.origin}, {split}: {error}.") from None
        place = (machine.rank, machine.world_size)
        parts.append(WindowBatches(stream, windows, block_size, config.rows(block_size), corpus.eot_id, *place))
    with machine.context(), track_progress("scoring", machine, sum(map(len, parts))) as watched:
        for part in parts:
            accumulate_losses(sums, model, watched(part), resolve_loss_chunk("auto", model.config))
    sums.sums = machine.summed(sums.sums)
    loss, bits_per_byte = sums.result()
    tokens, text_bytes = (int(sums.sums[number].item()) for number in (1, 3))
    seconds = time.perf_counter() - begun
    perplexity = math.exp(loss) if loss < 700 else math.inf  # where a float ends
    values = {
        "data": prepared.manifest.origin,
        "fingerprint": prepared.manifest.fingerprint(),
        "split": config.split,
        "documents": "packed" if corpus.eot_id is None else "masked",
        "windows": config.windows,
        "block_size": block_size,
        "stride": stride,
        "tokens": tokens,
        "bytes": text_bytes,
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": bits_per_byte,
        "seconds": seconds,
    }
    rows = [
        ("data", f"{prepared.manifest.origin}, {config.split}"),
        ("scored", f"{tokens:,} tokens, {text_bytes:,} bytes of text; windows of {block_size:,}, {stride:,} apart"),
        ("loss", f"{loss:.4f} nats per token"),
        ("perplexity", f"{perplexity:,.2f}"),
        ("bits per byte", f"{bits_per_byte:.4f}"),
    ]
    metrics = {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
    return EvalResult("loss", values, metrics, rows)


def evaluate_hellaswag(model: GPT, examples: list[Example], config: EvaluateConfig, machine: EvalContext) -> EvalResult:
    """Let a model choose endings; every process gets the numbers of all of them."""
    device, block_size = machine.device, model.config.block_size
    chunk, begun = resolve_loss_chunk("auto", model.config), time.perf_counter()
    counts = torch.zeros(3, dtype=torch.long, device=device)
    batches = rank_batches(examples, machine.rank, machine.world_size, config.rows(block_size))
    with machine.context(), track_progress("HellaSwag", machine, len(batches)) as watched:
        for batch in watched(batches):
            if batch:
                losses = ending_losses(model, batch, block_size=block_size, device=device, chunk=chunk)
                counts += torch.tensor(count_correct(losses, [example.label for example in batch]), device=device)
    found = AccuracyCounts(*machine.summed(counts).tolist())
    values = {
        "data": config.hellaswag,
        "examples": found.examples,
        "acc": found.acc,
        "acc_norm": found.acc_norm,
        "seconds": time.perf_counter() - begun,
    }
    rows = [
        ("HellaSwag", f"{config.hellaswag}, {found.examples:,} examples"),
        ("acc", f"{found.acc:.2%}, by the sum of an ending's losses"),
        ("acc_norm", f"{found.acc_norm:.2%}, by their mean"),
    ]
    return EvalResult("hellaswag", values, {"acc": found.acc, "acc_norm": found.acc_norm}, rows)


@contextmanager
def track_progress(what: str, machine: EvalContext, total: int) -> Iterator[Callable[[Iterable[T]], Iterator[T]]]:
    """Show a bar of so many batches on the first process while what goes through it is used up."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("batches ·"), TimeRemainingColumn())
    hidden = machine.rank > 0 or not get_console().is_terminal
    with Progress(*columns, console=get_console(), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)

        def watched(batches: Iterable[T]) -> Iterator[T]:
            for batch in batches:
                yield batch
                bar.advance(task)

        yield watched
