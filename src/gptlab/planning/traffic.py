"""What goes over the network in a step, and onto the disk. Imports no torch."""

from typing import NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.model.config import parameter_count
from gptlab.planning.activations import NUMBER_SIZES
from gptlab.planning.memory import ParallelLayout
from gptlab.planning.parameters import count_shares
from gptlab.training.config import MuonConfig


class DiskUsage(NamedTuple):
    """Bytes on the disk.

    Attributes:
        data: Tokens, as far as the run reads them.
        checkpoint: One checkpoint: weights and moments.
        kept: All that are there at a time, with the one that is being written.
    """

    data: float
    checkpoint: float
    kept: float


def network_traffic(config: RunConfig, spread: ParallelLayout, precision: str, micro_batch: int) -> float:
    """Bytes that a device sends in a step.

    Rings (Patarasuk and Yuan 2009): of a tensor, a sum for all takes 2 (n - 1) / n of its bytes, to gather or to sum it
    in parts takes (n - 1) / n. FSDP gathers every block for the forward pass and, where it was freed, again for the
    backward pass (Zhao et al. 2023, section 3).
    """
    n, kinds = spread.copies, NUMBER_SIZES[precision]
    ring = (n - 1) / n
    if spread.strategy == "single":
        return 0.0
    parts = count_shares(config.model, spread.split)
    gradients = parts.all * kinds.weight
    if spread.strategy == "ddp":
        return 2 * ring * gradients
    accumulation = max(1, config.train.global_batch_size // (micro_batch * n))
    times = 2 if config.trainer.reshard_after_forward else 1
    gathered = (times * parts.blocks + parts.rest) * kinds.product
    sharing = 0.0
    if spread.split > 1:
        sharing = _within_blocks(config, spread, kinds.product, micro_batch)
    return ring * gradients + accumulation * (ring * gathered + sharing)


def _within_blocks(config: RunConfig, spread: ParallelLayout, size: int, micro_batch: int) -> float:
    """Bytes that those send who share every block, of one micro-batch.

    Attention and MLP each sum their output in the forward pass and their input's gradient in the backward pass
    (Shoeybi et al. 2019, section 3); queries, keys and values go over all devices to come by heads, and back.
    """
    model, ring = config.model, (spread.split - 1) / spread.split
    tensor = micro_batch * model.block_size * model.n_embd * size
    return model.n_layer * ring * tensor * (2 * 4 + 2 * 3)


def disk_usage(config: RunConfig, precision: str, tokens: int) -> DiskUsage:
    """Bytes on the disk.

    Args:
        config: With the vocabulary.
        precision: Of the run.
        tokens: Of the corpus, or those that the run reads where the corpus is not known yet.
    """
    model, kept = config.model, 0
    numbers = 3 * parameter_count(model)
    if isinstance(config.optimizer, MuonConfig):
        numbers -= count_shares(model).matrices
    if config.train.ema_decay is not None:
        numbers += parameter_count(model)
    each = float(numbers * NUMBER_SIZES[precision].weight)
    if wanted := config.callbacks.checkpoint:
        kept = wanted.keep_last + wanted.keep_best + 1
    return DiskUsage(float(tokens * (2 if model.known_vocab_size <= 2**16 else 4)), each, kept * each)
