"""Forecast of the peak memory of a device, by kind. Imports no torch.

The peak is the maximum over five moments: after the logits are computed; in the forward pass of the last block; at the
start of the backward pass, in the head; in the backward pass of the last block; and in the optimizer step. In the first
two, the gradients of the previous step still exist.
"""

import os
from typing import NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.model.config import LINEAR_WIDTHS, GPTConfig, LoRAConfig, lora_count, parameter_count
from gptlab.planning.activations import (
    DTYPE_SIZES,
    ForwardPass,
    attention_kernel,
    attention_weight_bytes,
    backbone_bytes,
    block_bytes,
    block_kinds,
    head_bytes,
    head_copy_bytes,
    weight_copy_bytes,
)
from gptlab.training.config import ComponentOptimizerConfig, MuonConfig
from gptlab.training.hardware import Hardware

# Bytes of a process with all libraries that a run imports, without a model and without the pages of mapped files; and
# bytes that torch.compile adds. Measured with Python 3.11, torch 2.13 (CPU) and lightning 2.6.
LIBRARIES, COMPILER = 375e6, 300e6
# Fragmentation: glibc's malloc keeps freed memory between tensors of up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD): as
# measured, at least that of 3 tensors of the residual stream per block.
HOLES, MAPPED = 3, 32 * 2**20
CPU_STACK, STACK = 2**20, 2**26  # gptlab.training.optim.muon


class ParameterShares(NamedTuple):
    """Number of parameters on one device.

    Attributes:
        blocks: Parameters of all blocks, with those that LoRA adds.
        matrices: Parameters of the weight matrices of all blocks, which Muon trains.
        rest: Parameters of the embeddings, the final norm, and the head if it is not tied.
        trained: Parameters with a gradient: with LoRA, only those that it adds.
    """

    blocks: int
    matrices: int
    rest: int
    trained: int

    @property
    def all(self) -> int:
        """Number of all parameters."""
        return self.blocks + self.rest


class ParallelLayout(NamedTuple):
    """Parallel layout of a model over devices.

    Attributes:
        strategy: "single", "ddp", "fsdp" or "fsdp_tp".
        devices: Number of devices on all nodes.
        split: Number of devices that each block is split over (tensor parallelism).
    """

    strategy: str
    devices: int
    split: int = 1

    @property
    def copies(self) -> int:
        """Number of data-parallel ranks, or groups of ranks with tensor parallelism."""
        return self.devices // self.split

    @property
    def is_sharded(self) -> bool:
        """Whether parameters, gradients and optimizer state are sharded."""
        return self.strategy in ("fsdp", "fsdp_tp")


class MemoryEstimate(NamedTuple):
    """Peak memory of one device in bytes, by kind.

    Attributes:
        libraries: Python and libraries, on a CPU; 0 on a GPU, because torch's count excludes the memory of CUDA itself.
        weights: Parameters, or the shard of the device.
        gradients: Gradients that exist at the moment of the peak.
        moments: Optimizer state (the moments) and the moving average of the weights.
        copies: Copies of weights in the dtype of the matmuls, or gathered from other devices.
        activations: Tensors saved for the backward pass.
        logits: Logits, loss and their temporary tensors.
        holes: Fragmentation: freed memory that malloc does not return, on a CPU.
        buffers: Temporary tensors of the optimizer and of reductions; the copy for an asynchronous checkpoint.
        moment: Moment of the peak, in words.
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


def count_by_part(config: GPTConfig, lora: LoRAConfig | None = None) -> dict[str, int]:
    """Counts the parameters of each part of the model; their sum is ``parameter_count``, plus those of LoRA."""
    added = {"lora": lora_count(config, lora)} if lora else {}
    if config.counts is not None:
        return config.counts.parts | added
    width, rows = config.n_embd, config.padded_vocab_size
    parts = {
        "wte": rows * width,
        "wpe": config.block_size * width if config.positions == "learned" else 0,
        "value_embeds": config.value_embeddings * rows * width,
        "attention": config.n_layer * (4 * width * width + 4 * width * config.bias),
        "mlp": config.n_layer * (8 * width * width + 5 * width * config.bias),
        "lm_head": 0 if config.tie_weights else rows * width,
    }
    norms = parameter_count(config) - sum(parts.values())  # and learned mixing weights
    return {name: count for name, count in (parts | {"norms": norms} | added).items() if count}


def count_shares(config: GPTConfig, split: int = 1, lora: LoRAConfig | None = None) -> ParameterShares:
    """Counts the parameters on one device when the matrices of the blocks are split over ``split`` devices."""
    parts = count_by_part(config)
    if config.counts is not None:
        blocks, matrices = parts.get("h", 0), config.counts.matrices
        rest = parameter_count(config) - blocks
    else:
        matrices = config.n_layer * 12 * config.n_embd**2
        last = config.n_embd * (2 if config.bias and config.norm == "layer" else 1) * (1 + config.embedding_norm)
        rest = last + sum(parts.get(name, 0) for name in ("wte", "wpe", "value_embeds", "lm_head"))
        blocks = parameter_count(config) - rest
    blocks += matrices // split - matrices
    if lora is not None:
        added = lora_count(config, lora)
        return ParameterShares(blocks + added, matrices // split, rest, added)
    return ParameterShares(blocks, matrices // split, rest, blocks + rest)


def estimate_memory(
    config: RunConfig, hardware: Hardware, spread: ParallelLayout, micro_batch: int, chunk: int | None
) -> MemoryEstimate:
    """Returns the peak memory of one device.

    Args:
        config: Configuration with the vocabulary size.
        hardware: Hardware of the run, with its precision and compilation.
        spread: Parallel layout.
        micro_batch: Micro-batch size.
        chunk: Number of tokens whose logits are computed at a time, or None for all.
    """
    forward = ForwardPass(
        config.model,
        micro_batch,
        DTYPE_SIZES[hardware.precision],
        on_gpu=hardware.accelerator == "cuda",
        split=spread.split,
        compiled=hardware.compile is not False,
        lora=config.lora,
    )
    return max(_moments(config, hardware, spread, forward, chunk), key=lambda moment: moment.total)


def largest_micro_batch(config: RunConfig, hardware: Hardware, spread: ParallelLayout, chunk: int | None) -> int | None:
    """Returns the largest micro-batch size that fits on a device, 0 if none fits, or None if its memory is unknown."""
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
    """Returns the memory at each moment that can be the peak."""
    parts = count_shares(config.model, spread.split, config.lora)
    size, divided = forward.sizes.weight, spread.copies if spread.is_sharded else 1
    on_device = not (spread.is_sharded and config.trainer.cpu_offload and forward.on_gpu)  # shards, also of gradients
    weights, trained_bytes = (on_device * count * size / divided for count in (parts.all, parts.trained))
    state = on_device * optimizer_state_size(config, parts) * size / divided
    backbone, head = backbone_bytes(forward), head_bytes(forward, chunk)
    last_block = backbone + (block_bytes(forward, 0) if config.model.activation_checkpointing else 0)
    always = {
        "libraries": 0.0 if forward.on_gpu else LIBRARIES + COMPILER * (hardware.compile is not False),
        "weights": weights,
        "moments": state,
        "holes": 0.0 if forward.on_gpu else _fragmentation(forward),
    }
    copies = _copies(config, spread, forward, parts, chunk)
    forward_logits, backward_logits = _logits(forward, chunk)
    checkpoint_copy = weights + state if _copies_checkpoints(config) else 0.0
    # gradients persist during gradient accumulation, for which FSDP keeps them whole, and in DDP's buckets
    accumulates = config.train.global_batch_size > forward.batch * spread.copies
    accumulated = parts.trained * size if accumulates else 0
    earlier = max(accumulated, trained_bytes)  # of the previous micro-batch, or of the previous step
    persistent = trained_bytes if spread.strategy == "ddp" else accumulated
    embedding = 0 if config.lora else config.model.padded_vocab_size * config.model.n_embd * size
    with_head = max(persistent, embedding)  # FSDP reduces it at the end of the backward pass
    block_buffers = _block_gradients(forward)
    if spread.is_sharded:  # the block's gradients, and their copy in the dtype of the reduction
        block_buffers += parts.blocks / config.model.n_layer * (forward.sizes.matmul + forward.sizes.weight)

    def at(
        moment: str, gradients: float, copies: float, activations: float, logits: float, buffers: float
    ) -> MemoryEstimate:
        numbers = {"gradients": gradients, "copies": copies, "activations": activations, "logits": logits}
        return MemoryEstimate(**always, **numbers, buffers=buffers + checkpoint_copy, moment=moment)

    return [
        at("after the logits are computed", earlier, copies, backbone + head, forward_logits, 0.0),
        at("in the forward pass of the last block", earlier, copies, last_block, 0.0, 0.0),
        at("at the start of the backward pass", with_head, copies, backbone + head, backward_logits, 0.0),
        at("in the backward pass of the last block", with_head, copies, last_block, 0.0, block_buffers),
        at("in the optimizer step", trained_bytes, 0.0, 0.0, 0.0, _optimizer_buffers(config, spread, forward, parts)),
    ]


def _block_gradients(forward: ForwardPass) -> float:
    """Returns the number of bytes of the activation gradients of a block: of its MLP and of the residual stream.

    Eager squared ReLU has one more tensor of the MLP's width: autograd multiplies its gradient by a new tensor 2 x.
    """
    tensors = 3 if forward.config.activation == "relu_squared" and not forward.compiled else 2
    return 4.0 * tensors * forward.matmul // forward.split + forward.stream


def _fragmentation(forward: ForwardPass) -> float:
    """Returns the freed bytes that malloc keeps: in each block, the temporary tensors of its operations.

    The numbers of tensors were measured (docs/log.md, 2026-11-30). Compiled code has few temporary tensors. With a
    threshold of at most 1 MiB in MALLOC_MMAP_THRESHOLD_, malloc returns freed tensors to the system.
    """
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    if threshold.isdecimal() and int(threshold) <= 2**20:
        return 0.0
    config, lora, eager = forward.config, forward.lora, not forward.compiled
    blocks, stream, matmul = config.n_layer, forward.stream, forward.matmul // forward.split
    skips = sum(config.has_skip(layer) for layer in range(blocks)) if config.unet_skips else 0
    extra_values = sum(count * (config.num_extra_values(layer) > 0) for layer, count in block_kinds(config))
    widths = sum(LINEAR_WIDTHS[target][1] for target in set(lora.targets)) if lora else 0
    has_weights, has_new_heads = attention_kernel(forward) == "matmuls", config.qk_norm or config.positions != "learned"
    temporaries = [
        (stream, HOLES * blocks),
        (attention_weight_bytes(forward), blocks * eager * has_weights),
        (matmul, 3 * blocks * eager * (has_new_heads and not has_weights)),
        (4 * matmul, blocks * eager * (config.activation == "relu_squared")),
        (stream, 2 * blocks * eager * (config.norm == "rms")),
        (stream, 3 * blocks * eager * config.x0_skips),
        (stream, 2 * skips * eager),
        (matmul, 3 * extra_values * eager),
        (matmul, 0.8 * widths * blocks * eager),
    ]
    return float(sum(size * count for size, count in temporaries if size <= MAPPED))


def optimizer_state_size(config: RunConfig, parts: ParameterShares) -> int:
    """Returns the number of elements of the optimizer state, with the averaged weights.

    AdamW has two moments per trained parameter, and Muon has one for each matrix. The state of a component has been
    counted, or is assumed to be that of AdamW.
    """
    averages = 0 if config.train.ema_decay is None else parts.trained
    if isinstance(config.optimizer, ComponentOptimizerConfig) and config.optimizer.state_size is not None:
        return averages + config.optimizer.state_size * parts.all // parameter_count(config.model)
    return averages + 2 * parts.trained - (parts.matrices if isinstance(config.optimizer, MuonConfig) else 0)


def _copies(
    config: RunConfig, spread: ParallelLayout, forward: ForwardPass, parts: ParameterShares, chunk: int | None
) -> float:
    """Returns the number of bytes of copies of weights."""
    if not spread.is_sharded:
        return weight_copy_bytes(forward, chunk)
    # embeddings, final norm and head are gathered for the whole step, in their dtype; so are the blocks, in that of the
    # matmuls, unless they are resharded: then two at a time, one of which is prefetched
    blocks = 2 * parts.blocks / forward.config.n_layer if config.trainer.reshard_after_forward else parts.blocks
    return parts.rest * forward.sizes.weight + blocks * forward.sizes.matmul + head_copy_bytes(forward, chunk)


def _copies_checkpoints(config: RunConfig) -> bool:
    wanted = config.callbacks.checkpoint
    return wanted is not None and wanted.asynchronous


def _logits(forward: ForwardPass, chunk: int | None) -> tuple[float, float]:
    """Returns the temporary bytes of the head in the forward pass and in the backward pass."""
    config, size = forward.config, forward.sizes.matmul
    rows, vocabulary, tokens = config.padded_vocab_size, config.known_vocab_size, forward.tokens
    matrix = rows * config.n_embd
    if chunk is None or chunk >= tokens:
        if forward.compiled:
            return 0.0, float(tokens * rows * size)  # the gradient of the logits
        computed = tokens * rows * size + (tokens * vocabulary * 4 if size < 4 else 0)
        return float(computed), float(8 * tokens * vocabulary)  # two gradients in float32
    each = 2 * size + 4 if forward.compiled else 8 + (size if size < 4 else 0)  # matmul output, logits, log p
    copy = matrix * size if size < forward.sizes.weight else 0
    gradient = matrix * forward.sizes.weight if forward.lora is None else 0
    return float(chunk * rows * each + copy), float(forward.matmul + gradient)


def _optimizer_buffers(
    config: RunConfig, spread: ParallelLayout, forward: ForwardPass, parts: ParameterShares
) -> float:
    """Returns the temporary bytes of the optimizer step: none for fused AdamW, the stacked matrices for Muon.

    Ranks divide the four tensors of the orthogonalization. The directions and the updates, which they exchange, are
    sharded or, with DDP, whole.
    """
    if not isinstance(config.optimizer, MuonConfig):
        return 0.0
    largest, ranks = 4 * config.model.n_embd**2, spread.devices
    stack = min(max(STACK if forward.on_gpu else CPU_STACK, largest * ranks), parts.matrices * spread.split)
    size = 2 if config.optimizer.ns_dtype == "bfloat16" else 4
    exchanged = 0 if ranks == 1 else 2 / ranks if spread.strategy == "fsdp" else 2
    return float(stack * (4 / ranks + exchanged) * size + largest * 2 * forward.sizes.weight)
