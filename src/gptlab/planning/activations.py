"""Bytes of the activations that the forward pass saves for the backward pass, by part of the model. Imports no torch.

Counts what autograd saves for each operation in ``gptlab.model``; a tensor saved by several counts once. Shapes: B
sequences, T time, N = B T tokens, C channels, nh heads, hs head size, V vocabulary, R rows of the head.
"""

from typing import Literal, NamedTuple

from gptlab.model.config import GPTConfig

SHORT_SEQUENCE = 256  # gptlab.model.kernels.SHORT_SEQUENCE, without torch
STATISTIC = 4  # bytes of a mean, a standard deviation, or a softmax's log-sum
INDEX = 8  # bytes of a token id


class NumberSizes(NamedTuple):
    """Bytes per number, by use.

    Attributes:
        weight: Parameters, gradients and moments.
        stream: The residual stream.
        product: Inputs and outputs of matrix products.
    """

    weight: int
    stream: int
    product: int


NUMBER_SIZES = {
    "32-true": NumberSizes(4, 4, 4),
    "bf16-mixed": NumberSizes(4, 4, 2),  # autocast: only products are in bfloat16
    "bf16-true": NumberSizes(2, 2, 2),
}


class ForwardPass(NamedTuple):
    """One forward pass on one device.

    Attributes:
        config: The model.
        batch: B.
        kinds: Bytes per number.
        on_gpu: Whether it runs on a GPU's kernels.
        split: Devices that share every block (tensor parallelism).
        compiled: Whether torch.compile decides what is saved.
    """

    config: GPTConfig
    batch: int
    kinds: NumberSizes
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
        return self.tokens * self.config.n_embd * self.kinds.stream

    @property
    def product(self) -> int:
        """Bytes of one tensor (B, T, C) that is an input or output of a matrix product."""
        return self.tokens * self.config.n_embd * self.kinds.product


def network_bytes(forward: ForwardPass) -> int:
    """Returns the bytes saved by the whole model except the head."""
    config = forward.config
    layers = range(config.n_layer)
    if config.activation_checkpointing:
        blocks = config.n_layer * forward.stream
    else:
        blocks = sum(block_bytes(forward, layer) for layer in layers)
        blocks += forward.stream * (config.unet_skips and config.n_layer % 2 == 0)  # a block's own input, as its skip
    rotary = 2 * config.block_size * (config.head_size // 2) * STATISTIC  # tables of cosines and sines
    return (
        embedding_bytes(forward) + blocks + final_norm_bytes(forward) + (rotary if config.positions != "learned" else 0)
    )


def embedding_bytes(forward: ForwardPass) -> int:
    """Returns the bytes saved by the embeddings; their sum is the first block's input, and counts there."""
    config = forward.config
    kept = forward.tokens * INDEX
    if config.positions == "learned":
        kept += config.block_size * INDEX
    if config.embedding_norm:
        kept += _norm(forward)
    if config.dropout:
        kept += _mask_of_dropout(forward, forward.tokens * config.n_embd, forward.kinds.stream)
    return kept + config.value_embeddings * forward.stream


def final_norm_bytes(forward: ForwardPass) -> int:
    """Returns the bytes saved by ``ln_f``; its output is the head's input, and counts there."""
    return _norm(forward)


def block_bytes(forward: ForwardPass, layer: int) -> int:
    """Returns the bytes saved by a block; blocks are numbered from 0."""
    config = forward.config
    mixed = forward.stream * config.x0_skips  # the input before the embedding is mixed in
    norms = 2 * (_norm(forward) + forward.product)  # their inputs, and their outputs, which the products save
    if forward.compiled:
        norms -= 2 * forward.product  # recomputed from their inputs
    residual = 0
    if config.dropout:
        each = _mask_of_dropout(forward, forward.tokens * config.n_embd, forward.kinds.product)
        residual = 2 * each
    return mixed + norms + residual + attention_bytes(forward, layer) + mlp_bytes(forward)


def attention_bytes(forward: ForwardPass, layer: int) -> int:
    """Returns the bytes saved by a block's attention, from the output of ``c_attn`` to the input of ``c_proj``."""
    config, each = forward.config, forward.product // forward.split
    turned = config.positions != "learned" or config.qk_norm  # queries and keys are new tensors
    whole = 3 * each  # the output of c_attn, of which queries, keys and values are views
    match _kernel(forward):
        case "flash":
            logarithms = forward.tokens * config.n_head // forward.split * STATISTIC
            kept = whole + each + logarithms + (3 * each if turned else 0)  # rotated: the output is copied
        case "products":
            kept = 3 * each + each + _weights(forward) + config.block_size**2  # the mask
            kept += whole if config.qk_norm or config.num_extra_values(layer) else 0
        case "plain":
            kept = 3 * each * 4 // forward.kinds.product + each + _weights(forward)
            kept += whole if config.qk_norm or config.num_extra_values(layer) else 0
    if config.qk_norm:
        kept += 2 * forward.tokens * config.n_head // forward.split * STATISTIC
        if forward.kinds.product < 4 and not forward.on_gpu:
            kept += 2 * each * 4 // forward.kinds.product  # computed in float32
    if not forward.on_gpu and not config.is_global(layer) and _kernel(forward) != "products":
        kept += config.block_size**2 * forward.kinds.product  # the mask, as numbers that are added
    return kept + (each if config.num_extra_values(layer) else 0)


def mlp_bytes(forward: ForwardPass) -> int:
    """Returns the bytes saved by a block's MLP, from the output of ``c_fc`` to the input of ``c_proj``."""
    inner = 4 * forward.product // forward.split
    return inner if forward.compiled else 2 * inner  # the activation saves its input (GELU) or output (ReLU)


def head_bytes(forward: ForwardPass, chunk: int | None) -> int:
    """Returns the bytes saved from the head's input to the loss."""
    config, tokens = forward.config, forward.tokens
    if chunk is not None and chunk < tokens:
        return forward.product + config.padded_vocab_size * config.n_embd * forward.kinds.weight
    if forward.compiled:  # log-softmax is recomputed from the logits
        return forward.product + tokens * INDEX + tokens * config.padded_vocab_size * forward.kinds.product
    capped = tokens * config.known_vocab_size * forward.kinds.product if config.logit_soft_cap else 0
    return forward.product + tokens * INDEX + capped + tokens * config.known_vocab_size * STATISTIC


def weight_copy_bytes(forward: ForwardPass, chunk: int | None) -> int:
    """Returns the bytes of autocast's copies of weights in the type of the products, which the backward pass needs."""
    config, kinds = forward.config, forward.kinds
    if kinds.weight == kinds.product:
        return 0
    blocks = config.n_layer * 12 * config.n_embd**2 // forward.split
    head = config.padded_vocab_size * config.n_embd if chunk is None or chunk >= forward.tokens else 0
    return (blocks + head) * kinds.product


def _norm(forward: ForwardPass) -> int:
    """Returns the bytes saved by a norm: its input and, if RMSNorm consists of several operations, their results."""
    if forward.config.norm == "layer":
        return forward.stream + 2 * forward.tokens * STATISTIC
    if forward.on_gpu or forward.compiled:
        return forward.stream + forward.tokens * STATISTIC
    return 2 * forward.tokens * forward.config.n_embd * 4 + forward.tokens * STATISTIC


def _mask_of_dropout(forward: ForwardPass, numbers: int, size: int) -> int:
    """Returns the bytes of a dropout mask: one per number on a GPU, a factor on a CPU."""
    return numbers * (1 if forward.on_gpu else size)


def _kernel(forward: ForwardPass) -> Literal["flash", "products", "plain"]:
    """Returns the kernel that ``gptlab.model.kernels.attend`` chooses."""
    if forward.on_gpu:
        return "flash"
    if forward.kinds.product == 4 and forward.config.block_size <= SHORT_SEQUENCE:
        return "products"
    return "plain" if forward.config.dropout else "flash"  # torch's CPU kernel has no dropout


def _weights(forward: ForwardPass) -> int:
    """Returns the bytes of the attention weights of all heads; with dropout, of its mask and result as well."""
    config = forward.config
    weights = forward.batch * config.n_head // forward.split * config.block_size**2 * 4
    return weights * (3 if config.dropout else 1)
