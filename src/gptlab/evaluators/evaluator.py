"""Evaluation of a model on a corpus and on HellaSwag, in one process or in several started by torchrun or srun."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gptlab.data.shards.manifest import SPLITS
from gptlab.errors import UserError
from gptlab.evaluation.completions import AccuracyCounts, count_correct, ending_losses, rank_batches
from gptlab.evaluation.hellaswag import Example
from gptlab.evaluation.loss import LossSums, WindowBatches, accumulate_losses, check_finite, cut_windows
from gptlab.evaluators.corpora import ScoredCorpus
from gptlab.evaluators.results import EvalResult
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.model.gpt import GPT
from gptlab.terminal import get_console
from gptlab.training.devices import use_best_matmul
from gptlab.training.distributed.processes import external_devices, launched_externally
from gptlab.training.hardware import Hardware, resolve_loss_chunk

T = TypeVar("T")


class EvalContext(NamedTuple):
    """Device, precision and rank of one process of an evaluation.

    Attributes:
        device: Device of the model.
        precision: "float32", or "bfloat16" for matmuls in bfloat16 with weights and losses in float32.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    device: torch.device
    precision: Literal["float32", "bfloat16"]
    rank: int
    world_size: int

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context manager of a forward pass: autocast to bfloat16, or none for float32."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss_chunk(self, model: GPT) -> int | None:
        """Returns the number of tokens whose logits are computed at a time."""
        is_cpu = self.device.type == "cpu"
        name = "" if is_cpu else torch.cuda.get_device_name(self.device)
        hardware = Hardware("cpu" if is_cpu else "cuda", name, 1, 1, self.precision, compile=False)
        return resolve_loss_chunk("auto", model.config, hardware)

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """Sums ``numbers`` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers


def create_eval_context(precision: Literal["auto", "float32", "bfloat16"]) -> EvalContext:
    """Selects the GPU if there is one, and joins the process group if torchrun or srun started this process.

    Args:
        precision: Precision. "auto" means bfloat16 on GPUs that support it, otherwise float32.
    """
    cuda = torch.cuda.is_available()
    rank, world_size = 0, 1
    if launched_externally():
        from gptlab.training.distributed.process_group import join_group  # imports Lightning

        devices, nodes = external_devices()
        join_group(Hardware("cuda" if cuda else "cpu", "", devices, nodes, "32-true", compile=False))
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    use_best_matmul(device)
    if precision == "auto":
        precision = "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return EvalContext(device, precision, rank, world_size)


def evaluate_corpus(model: GPT, corpus: ScoredCorpus, config: EvaluateConfig, context: EvalContext) -> EvalResult:
    """Scores a model on ``config.split`` of a corpus. Every process returns the result over all processes.

    Args:
        model: Model, on the device of ``context``.
        corpus: Corpus to score.
        config: Config of the evaluation.
        context: Device, precision and rank.

    Raises:
        UserError: A split has fewer than two tokens, or the loss is not finite.
    """
    prepared, block_size = corpus.prepared, model.config.block_size
    stride = config.stride or block_size
    sums = LossSums(torch.from_numpy(prepared.tokenizer.token_bytes()).to(context.device))
    splits = [split for split in SPLITS if prepared.manifest.splits[split]] if config.split == "all" else [config.split]
    parts, start = [], time.perf_counter()
    for split in splits:
        stream = prepared.stream(split)
        try:
            windows = cut_windows(len(stream), block_size, stride, config.windows)
        except ValueError as error:
            raise UserError(f"{prepared.manifest.origin}, split={split}: {error}.") from None
        ranks = (context.rank, context.world_size)
        parts.append(WindowBatches(stream, windows, block_size, config.rows(block_size), corpus.eot_id, *ranks))
    with context.autocast(), track_progress("scoring", context, sum(map(len, parts))) as track:
        for part in parts:
            accumulate_losses(sums, model, track(part), context.loss_chunk(model))
    sums.sums = context.all_reduce(sums.sums)
    loss, bits_per_byte = sums.result()
    check_finite([loss], prepared.manifest.origin)
    tokens, text_bytes = (int(sums.sums[number].item()) for number in (1, 3))
    seconds = time.perf_counter() - start
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows above about 709
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
        ("scored", f"{tokens:,} tokens, {text_bytes:,} bytes of text; block size {block_size:,}, stride {stride:,}"),
        ("loss", f"{loss:.4f} nats per token"),
        ("perplexity", f"{perplexity:,.2f}"),
        ("bits per byte", f"{bits_per_byte:.4f}"),
    ]
    metrics = {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
    return EvalResult("loss", values, metrics, rows)


def evaluate_hellaswag(model: GPT, examples: list[Example], config: EvaluateConfig, context: EvalContext) -> EvalResult:
    """Scores a model on HellaSwag. Every process returns the result over all processes.

    Args:
        model: Model, on the device of ``context``.
        examples: All examples, the same list in every process; each process scores its share.
        config: Config of the evaluation.
        context: Device, precision and rank.

    Raises:
        UserError: A loss is not finite.
    """
    device, block_size = context.device, model.config.block_size
    chunk, start = context.loss_chunk(model), time.perf_counter()
    counts = torch.zeros(3, dtype=torch.long, device=device)
    batches = rank_batches(examples, context.rank, context.world_size, config.rows(block_size))
    with context.autocast(), track_progress("HellaSwag", context, len(batches)) as track:
        for batch in track(batches):
            if batch:
                losses = ending_losses(model, batch, block_size=block_size, device=device, chunk=chunk)
                check_finite((loss.nats for endings in losses for loss in endings), str(config.hellaswag))
                counts += torch.tensor(count_correct(losses, [example.label for example in batch]), device=device)
    found = AccuracyCounts(*context.all_reduce(counts).tolist())
    values = {
        "data": config.hellaswag,
        "examples": found.examples,
        "acc": found.acc,
        "acc_norm": found.acc_norm,
        "seconds": time.perf_counter() - start,
    }
    rows = [
        ("HellaSwag", f"{config.hellaswag}, {found.examples:,} examples"),
        ("acc", f"{found.acc:.2%} (lowest sum of token losses)"),
        ("acc_norm", f"{found.acc_norm:.2%} (lowest mean of token losses)"),
    ]
    return EvalResult("hellaswag", values, {"acc": found.acc, "acc_norm": found.acc_norm}, rows)


@contextmanager
def track_progress(
    description: str, context: EvalContext, total: int
) -> Iterator[Callable[[Iterable[T]], Iterator[T]]]:
    """Shows a progress bar of ``total`` batches on the first rank. Yields a function that wraps the batches."""
    columns = (
        *(TextColumn(description), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("batches ·"), TimeRemainingColumn()),
    )
    hidden = context.rank > 0 or not get_console().is_terminal
    with Progress(*columns, console=get_console(), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)

        def track(batches: Iterable[T]) -> Iterator[T]:
            for batch in batches:
                yield batch
                bar.advance(task)

        yield track
