"""Peak memory of a device, by kind. Imports no torch.

The peak is at one of five moments: when the head has computed the logits, or the forward pass is in the last block, and
the gradients of the step before still exist; when the backward pass begins with the head, or is in the last block; and
in the step of the optimizer. Shapes: N tokens of a micro-batch, C channels, V vocabulary, R rows of the
head.
"""

from typing import NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.model.config import GPTConfig, lora_count, parameter_count
from gptlab.planning.activations import (
    NUMBER_SIZES,
    ForwardPass,
    block_bytes,
    head_bytes,
    mlp_bytes,
    network_bytes,
    weight_copy_bytes,
)
from gptlab.training.config import MuonConfig
from gptlab.training.hardware import Hardware

# Bytes of a process with everything imported, before it has a network: measured with Python 3.11, torch 2.13 (CPU) and
# lightning 2.6; and what torch.compile adds.
LIBRARIES, COMPILER = 500e6, 300e6
# glibc's malloc keeps holes between tensors of up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD): measured, so much of what
# the forward pass makes, kept or not.
HOLES, MAPPED = 0.35, 32 * 2**20
CPU_STACK, STACK = 2**20, 2**26  # gptlab.training.optim.muon


class ParameterShares(NamedTuple):
    """Number of parameters on one device.

    Attributes:
        blocks: All blocks.
        matrices: Among them the matrices, which Muon trains.
        rest: Embeddings, final norm, and the head if it is not tied.
    """

    blocks: int
    matrices: int
    rest: int

    @property
    def all(self) -> int:
        """Every parameter."""
        return self.blocks + self.rest


class ParallelLayout(NamedTuple):
    """How a model is spread over devices.

    Attributes:
        strategy: "single", "ddp", "fsdp" or "fsdp_tp".
        devices: Devices of all nodes.
        split: Devices that share every block (tensor parallelism).
    """

    strategy: str
    devices: int
    split: int = 1

    @property
    def copies(self) -> int:
        """Devices, or groups that share a model, that read data of their own."""
        return self.devices // self.split

    @property
    def is_sharded(self) -> bool:
        """Whether parameters, gradients and moments are divided."""
        return self.strategy in ("fsdp", "fsdp_tp")


class MemoryEstimate(NamedTuple):
    """Peak memory of one device in bytes, by kind.

    Attributes:
        libraries: Python and the libraries, for a CPU; 0 for a GPU, whose memory by torch's count excludes CUDA's own.
        weights: Parameters, or this device's share of them.
        gradients: Gradients that exist at that moment.
        moments: Moments of the optimizer, and the average of the weights.
        copies: Copies of weights: in the type of the products, or gathered from the other devices.
        activations: Tensors saved for the backward pass.
        logits: Logits, loss and their temporary tensors.
        holes: Freed memory that malloc does not return, on a CPU.
        buffers: Temporary tensors of the optimizer and of reductions; the copy of an asynchronous checkpoint.
        moment: The moment of the peak.
    """

    libraries: float
    weights: float
    gradients: float
    moments: float
    copies: float
    activations: float
    logits: float
    holes: float
    buffers: float
    moment: str

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        return sum(part for part in self if not isinstance(part, str))


def count_by_part(config: GPTConfig) -> dict[str, int]:
    """Counts the parameters of each part of the model; their sum is ``parameter_count``."""
    width, rows = config.n_embd, config.padded_vocab_size
    parts = {
        "wte": rows * width,
        "wpe": config.block_size * width if config.positions == "learned" else 0,
        "value_embeds": config.value_embeddings * rows * width,
        "attention": config.n_layer * (4 * width * width + 4 * width * config.bias),
        "mlp": config.n_layer * (8 * width * width + 5 * width * config.bias),
        "lm_head": 0 if config.tie_weights else rows * width,
    }
    norms = parameter_count(config) - sum(parts.values())  # and the few weights that mix
    return {name: count for name, count in (parts | {"norms": norms}).items() if count}


def count_shares(config: GPTConfig, split: int = 1) -> ParameterShares:
    """Counts the parameters of a device if ``split`` devices share the matrices of the blocks (norms stay whole)."""
    total = parameter_count(config)
    parts = count_by_part(config)
    matrices = config.n_layer * 12 * config.n_embd**2
    last = config.n_embd * (2 if config.bias and config.norm == "layer" else 1) * (1 + config.embedding_norm)
    rest = last + sum(parts.get(name, 0) for name in ("wte", "wpe", "value_embeds", "lm_head"))
    blocks = total - rest
    return ParameterShares(blocks - matrices + matrices // split, matrices // split, rest)


def estimate_memory(
    config: RunConfig, hardware: Hardware, spread: ParallelLayout, micro_batch: int, chunk: int | None
) -> MemoryEstimate:
    """Returns the peak memory of one device.

    Args:
        config: The configuration, with the vocabulary.
        hardware: What it runs on, which decides kernels and precision.
        spread: How the model is spread.
        micro_batch: Sequences that a device holds at once.
        chunk: Tokens whose logits are computed at a time; None is all.
    """
    forward = ForwardPass(
        config.model,
        micro_batch,
        NUMBER_SIZES[hardware.precision],
        on_gpu=hardware.accelerator == "cuda",
        split=spread.split,
        compiled=hardware.compile is not False,
    )
    return max(_moments(config, hardware, spread, forward, chunk), key=lambda moment: moment.total)


def largest_micro_batch(config: RunConfig, hardware: Hardware, spread: ParallelLayout, chunk: int | None) -> int | None:
    """Returns the most sequences that fit in a device at once, or None if its memory is not known."""
    room = hardware.memory
    if room is None:
        return None

    def fits(batch: int) -> bool:
        return estimate_memory(config, hardware, spread, batch, chunk).total <= room

    if not fits(1):
        return 0
    most = 1
    while fits(2 * most):
        most *= 2
    step = most
    while step := step // 2:
        most += step * fits(most + step)
    return most


def _moments(
    config: RunConfig, hardware: Hardware, spread: ParallelLayout, forward: ForwardPass, chunk: int | None
) -> list[MemoryEstimate]:
    """Returns the memory at each moment that may be the peak."""
    parts = count_shares(config.model, spread.split)
    size, divided = forward.kinds.weight, spread.copies if spread.is_sharded else 1
    weights = parts.all * size / divided
    trained_bytes = weights if config.lora is None else lora_count(config.model, config.lora) * size / divided
    network, head = network_bytes(forward), head_bytes(forward, chunk)
    again = block_bytes(forward, 0) if config.model.activation_checkpointing else 0
    always = {
        "libraries": 0.0 if forward.on_gpu else LIBRARIES + COMPILER * (hardware.compile is not False),
        "weights": weights,
        "moments": _moments_of(config, parts, size) / divided if config.lora is None else 2 * trained_bytes,
        "holes": 0.0 if forward.on_gpu else _holes(forward),
    }
    copies = _copies(spread, forward, parts, chunk)
    making, learning = _logits(forward, chunk)
    waiting = weights + 2 * trained_bytes if _copies_checkpoints(config) else 0.0
    # gradients persist if micro-batches accumulate in them, and in DDP's buckets
    stay = trained_bytes if spread.strategy == "ddp" or _accumulates(config, spread, forward) else 0.0
    of_its_head = max(stay, 0 if config.lora else config.model.padded_vocab_size * config.model.n_embd * size / divided)

    def at(
        moment: str, gradients: float, copies: float, activations: float, logits: float, buffers: float
    ) -> MemoryEstimate:
        numbers = {"gradients": gradients, "copies": copies, "activations": activations, "logits": logits}
        return MemoryEstimate(**always, **numbers, buffers=buffers + waiting, moment=moment)

    return [
        at("when the logits are there", trained_bytes, copies, network + head, making, 0.0),
        at("when the forward pass is in the last block", trained_bytes, copies, network + again, 0.0, 0.0),
        at("when the backward pass begins", of_its_head, copies, network + head, learning, 0.0),
        at("when the backward pass is in the last block", of_its_head, copies, network + again, 0.0, _between(forward)),
        at("in the optimizer's step", trained_bytes, 0.0, 0.0, 0.0, _stepping(config, forward, parts)),
    ]


def _between(forward: ForwardPass) -> float:
    """Returns the bytes of the gradients within a block in the backward pass: of its MLP and of the stream."""
    return 8.0 * forward.product // forward.split + forward.stream


def _holes(forward: ForwardPass) -> float:
    """Returns the bytes that malloc keeps; large tensors are returned."""
    config = forward.config
    blocks = sum(block_bytes(forward, layer) for layer in range(config.n_layer))
    are_large = 4 * forward.product // forward.split > MAPPED
    return HOLES * (blocks - (config.n_layer * mlp_bytes(forward) if are_large else 0))


def _moments_of(config: RunConfig, parts: ParameterShares, size: int) -> float:
    """Returns the bytes of the moments: two per parameter for AdamW, one for Muon's matrices; and of the average."""
    numbers = 2 * parts.all
    if isinstance(config.optimizer, MuonConfig):
        numbers -= parts.matrices
    if config.train.ema_decay is not None:
        numbers += parts.all
    return numbers * size


def _copies(spread: ParallelLayout, forward: ForwardPass, parts: ParameterShares, chunk: int | None) -> float:
    """Returns the bytes of copies of weights."""
    if not spread.is_sharded:
        return weight_copy_bytes(forward, chunk)
    # what is no block is gathered for the whole step; of the blocks one, and the next ahead of it
    blocks = forward.config.n_layer
    return (parts.rest + 2 * parts.blocks / blocks) * forward.kinds.product


def _accumulates(config: RunConfig, spread: ParallelLayout, forward: ForwardPass) -> bool:
    return config.train.global_batch_size > forward.batch * spread.copies


def _copies_checkpoints(config: RunConfig) -> bool:
    wanted = config.callbacks.checkpoint
    return wanted is not None and wanted.asynchronous


def _logits(forward: ForwardPass, chunk: int | None) -> tuple[float, float]:
    """Returns the head's temporary bytes in the forward pass, and in the backward pass."""
    config, size = forward.config, forward.kinds.product
    rows, vocabulary, tokens = config.padded_vocab_size, config.known_vocab_size, forward.tokens
    matrix = rows * config.n_embd
    if chunk is None or chunk >= tokens:
        if forward.compiled:
            return 0.0, float(tokens * rows * size)  # the logits' gradient
        made = tokens * rows * size + (tokens * vocabulary * 4 if size < 4 else 0)
        return float(made), float(8 * tokens * vocabulary)  # two gradients in float32
    each = 2 * size + 4 if forward.compiled else 8 + (size if size < 4 else 0)  # the product, logits, log p
    copy = matrix * size if size < forward.kinds.weight else 0
    return float(chunk * rows * each + copy), float(forward.product + matrix * forward.kinds.weight)


def _stepping(config: RunConfig, forward: ForwardPass, parts: ParameterShares) -> float:
    """Returns the temporary bytes of the optimizer's step: none for fused AdamW, for Muon the stacked matrices."""
    if not isinstance(config.optimizer, MuonConfig):
        return 0.0
    largest = 4 * config.model.n_embd**2
    stack = min(max(STACK if forward.on_gpu else CPU_STACK, largest), parts.matrices)
    size = 2 if config.optimizer.ns_dtype == "bfloat16" else 4
    return float(stack * 4 * size + largest * 2 * forward.kinds.weight)
