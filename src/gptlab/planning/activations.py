"""Bytes of the activations that the forward pass saves for the backward pass, by part of the model. Imports no torch.

Counts the tensors that autograd saves for each operation in ``gptlab.model``. A tensor that several operations save
counts once. Shapes: B sequences, T time, N = B T tokens, C channels.
"""

from typing import Literal, NamedTuple

from gptlab.model.config import GPTConfig

SHORT_SEQUENCE = 256  # gptlab.model.kernels.SHORT_SEQUENCE, without torch
STATISTIC = 4  # bytes of a mean, a standard deviation, or the log-sum-exp of a softmax
INDEX = 8  # bytes of a token ID


class DtypeSizes(NamedTuple):
    """Bytes per element, by use.

    Attributes:
        weight: Parameters, gradients and optimizer state.
        stream: Residual stream.
        matmul: Inputs and outputs of matmuls.
    """

    weight: int
    stream: int
    matmul: int


DTYPE_SIZES = {
    "32-true": DtypeSizes(4, 4, 4),
    "bf16-mixed": DtypeSizes(4, 4, 2),  # autocast: only matmuls are in bfloat16
    "bf16-true": DtypeSizes(2, 2, 2),
}


class ForwardPass(NamedTuple):
    """One forward pass on one device.

    Attributes:
        config: Model config.
        batch: Micro-batch size, B.
        sizes: Bytes per element.
        on_gpu: Whether it runs with GPU kernels.
        split: Number of devices that each block is split over (tensor parallelism).
        compiled: Whether the model is compiled, so that torch.compile decides which tensors are saved.
    """

    config: GPTConfig
    batch: int
    sizes: DtypeSizes
    on_gpu: bool
    split: int = 1
    compiled: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return self.batch * self.config.block_size

    @property
    def stream(self) -> int:
        """Bytes of one tensor (B, T, C) of the residual stream."""
        return self.tokens * self.config.n_embd * self.sizes.stream

    @property
    def matmul(self) -> int:
        """Bytes of one tensor (B, T, C) that is an input or output of a matmul."""
        return self.tokens * self.config.n_embd * self.sizes.matmul


def backbone_bytes(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the model, without the head."""
    config = forward.config
    layers = range(config.n_layer)
    if config.activation_checkpointing:
        blocks = config.n_layer * forward.stream
    else:
        blocks = sum(block_bytes(forward, layer) for layer in layers)
        blocks += forward.stream * (config.unet_skips and config.n_layer % 2 == 0)  # inputs of the blocks with a skip
    rotary = 2 * config.block_size * (config.head_size // 2) * STATISTIC  # tables of cosines and sines
    return (
        embedding_bytes(forward) + blocks + final_norm_bytes(forward) + (rotary if config.positions != "learned" else 0)
    )


def embedding_bytes(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the embeddings.

    Excludes their sum, which counts as the input of the first block.
    """
    config = forward.config
    kept = forward.tokens * INDEX
    if config.positions == "learned":
        kept += config.block_size * INDEX
    if config.embedding_norm:
        kept += _norm(forward)
    if config.dropout:
        kept += _dropout_mask(forward, forward.tokens * config.n_embd, forward.sizes.stream)
    return kept + config.value_embeddings * forward.stream


def final_norm_bytes(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of ``ln_f``.

    Excludes its output, which counts as the input of the head.
    """
    return _norm(forward)


def block_bytes(forward: ForwardPass, layer: int) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of block ``layer`` (zero-based)."""
    config = forward.config
    mixed = forward.stream * config.x0_skips  # the input, before x0 is mixed in
    norms = 2 * (_norm(forward) + forward.matmul)  # their inputs, and their outputs, saved by the matmuls
    if forward.compiled:
        norms -= 2 * forward.matmul  # the outputs are recomputed
    residual = 0
    if config.dropout:
        each = _dropout_mask(forward, forward.tokens * config.n_embd, forward.sizes.matmul)
        residual = 2 * each
    return mixed + norms + residual + attention_bytes(forward, layer) + mlp_bytes(forward)


def attention_bytes(forward: ForwardPass, layer: int) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the attention of block ``layer``.

    Counts from the output of ``c_attn`` to the input of ``c_proj``.
    """
    config, each = forward.config, forward.matmul // forward.split
    is_transformed = config.positions != "learned" or config.qk_norm  # queries and keys are new tensors
    whole = 3 * each  # the output of c_attn; queries, keys and values are views of it
    match _kernel(forward):
        case "flash":
            log_sums = forward.tokens * config.n_head // forward.split * STATISTIC
            kept = whole + each + log_sums + (3 * each if is_transformed else 0)
        case "matmuls":
            kept = 3 * each + each + _weights(forward) + config.block_size**2  # the mask
            kept += whole if config.qk_norm or config.num_extra_values(layer) else 0
        case "plain":
            kept = 3 * each * 4 // forward.sizes.matmul + each + _weights(forward)
            kept += whole if config.qk_norm or config.num_extra_values(layer) else 0
    if config.qk_norm:
        kept += 2 * forward.tokens * config.n_head // forward.split * STATISTIC
        if forward.sizes.matmul < 4 and not forward.on_gpu:
            kept += 2 * each * 4 // forward.sizes.matmul  # computed in float32
    if not forward.on_gpu and not config.is_global(layer) and _kernel(forward) != "matmuls":
        kept += config.block_size**2 * forward.sizes.matmul  # the additive mask
    return kept + (each if config.num_extra_values(layer) else 0)


def mlp_bytes(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the MLP of a block.

    Counts from the output of ``c_fc`` to the input of ``c_proj``.
    """
    inner = 4 * forward.matmul // forward.split
    return inner if forward.compiled else 2 * inner  # the activation saves its input (GELU) or output (ReLU)


def head_bytes(forward: ForwardPass, chunk: int | None) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the head and the loss.

    Args:
        forward: Forward pass.
        chunk: Number of tokens whose logits are computed at a time, or None for all.
    """
    config, tokens = forward.config, forward.tokens
    if chunk is not None and chunk < tokens:
        return forward.matmul + config.padded_vocab_size * config.n_embd * forward.sizes.weight
    if forward.compiled:  # log-softmax is recomputed from the logits
        return forward.matmul + tokens * INDEX + tokens * config.padded_vocab_size * forward.sizes.matmul
    capped = tokens * config.known_vocab_size * forward.sizes.matmul if config.logit_soft_cap else 0
    return forward.matmul + tokens * INDEX + capped + tokens * config.known_vocab_size * STATISTIC


def weight_copy_bytes(forward: ForwardPass, chunk: int | None) -> int:
    """Returns the number of bytes of autocast's copies of weights, saved for the backward pass.

    The copies have the dtype of the matmuls.

    Args:
        forward: Forward pass.
        chunk: Number of tokens whose logits are computed at a time, or None for all.
    """
    config, sizes = forward.config, forward.sizes
    if sizes.weight == sizes.matmul:
        return 0
    blocks = config.n_layer * 12 * config.n_embd**2 // forward.split
    head = config.padded_vocab_size * config.n_embd if chunk is None or chunk >= forward.tokens else 0
    return (blocks + head) * sizes.matmul


def _norm(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of a norm.

    Counts its input and statistics and, for an unfused RMSNorm, intermediate results.
    """
    if forward.config.norm == "layer":
        return forward.stream + 2 * forward.tokens * STATISTIC
    if forward.on_gpu or forward.compiled:
        return forward.stream + forward.tokens * STATISTIC
    return 2 * forward.tokens * forward.config.n_embd * 4 + forward.tokens * STATISTIC


def _dropout_mask(forward: ForwardPass, numbers: int, size: int) -> int:
    """Returns the number of bytes of a dropout mask: one byte per element on a GPU, ``size`` bytes on a CPU."""
    return numbers * (1 if forward.on_gpu else size)


def _kernel(forward: ForwardPass) -> Literal["flash", "matmuls", "plain"]:
    """Returns the kernel that ``gptlab.model.kernels.attend`` chooses."""
    if forward.on_gpu:
        return "flash"
    if forward.sizes.matmul == 4 and forward.config.block_size <= SHORT_SEQUENCE:
        return "matmuls"
    return "plain" if forward.config.dropout else "flash"  # torch's CPU kernel has no dropout


def _weights(forward: ForwardPass) -> int:
    """Returns the number of bytes of all attention weights and, with dropout, of the mask and the result."""
    config = forward.config
    weights = forward.batch * config.n_head // forward.split * config.block_size**2 * 4
    return weights * (3 if config.dropout else 1)
