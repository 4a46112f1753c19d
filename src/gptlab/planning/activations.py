"""Bytes of the activations that the forward pass saves for the backward pass, by part of the model. Imports no torch.

Counts the tensors that autograd saves for each operation in ``gptlab.model``. A tensor that several operations save
counts once. Shapes: B sequences, T time, N = B T tokens, C channels.
"""

from typing import Literal, NamedTuple

from gptlab.model.config import LINEAR_WIDTHS, GPTConfig, LoRAConfig, inputs_with_gradient, lora_count

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
        lora: LoRA config. Layers and mixers with frozen weights do not save their inputs, which only the gradients of
            weights need.
    """

    config: GPTConfig
    batch: int
    sizes: DtypeSizes
    on_gpu: bool
    split: int = 1
    compiled: bool = False
    lora: LoRAConfig | None = None

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

    def trains(self, layer: str) -> bool:
        """Returns whether the weight of this linear layer of a block is trained, so that the layer saves its input."""
        return self.lora is None or layer in self.lora.targets


def backbone_bytes(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the model, without the head."""
    config = forward.config
    if config.activation_checkpointing:
        blocks = config.n_layer * forward.stream
    else:
        blocks = sum(count * block_bytes(forward, layer) for layer, count in block_kinds(config))
        if forward.lora is None:
            blocks += forward.stream * (config.unet_skips and config.n_layer % 2 == 0)  # inputs of blocks with a skip
    rotary = 2 * config.block_size * (config.head_size // 2) * STATISTIC  # tables of cosines and sines
    return (
        embedding_bytes(forward) + blocks + final_norm_bytes(forward) + (rotary if config.positions != "learned" else 0)
    )


def block_kinds(config: GPTConfig) -> list[tuple[int, int]]:
    """Returns one block of each kind, counted from 0, with the number of blocks that save as much."""
    if config.attention_window is None and not (config.value_residual or config.value_embeddings):
        return [(0, 1), (1, config.n_layer - 1)]
    kinds: dict[tuple[bool, bool, int], list[int]] = {}
    for layer in range(config.n_layer):
        kinds.setdefault((layer == 0, config.is_global(layer), config.num_extra_values(layer)), []).append(layer)
    return [(layers[0], len(layers)) for layers in kinds.values()]


def embedding_bytes(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the embeddings.

    Excludes their sum, which counts as the input of the first block.
    """
    config = forward.config
    if forward.lora is not None:  # frozen
        return 0
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
    config, needed = forward.config, inputs_with_gradient(forward.lora, layer)
    mixed = forward.stream if config.x0_skips and forward.lora is None else 0  # the input, before x0 is mixed in
    norms = 0
    for linear in ("attn.c_attn", "mlp.c_fc"):
        norms += _norm(forward) if needed[linear] else 0
        norms += forward.matmul if forward.trains(linear) and not forward.compiled else 0  # compiled: recomputed
    residual = 0
    if config.dropout:
        each = _dropout_mask(forward, forward.tokens * config.n_embd, forward.sizes.matmul)
        residual = each * (1 + needed["mlp.c_fc"])
    adapters = forward.tokens * forward.lora.rank * len({*forward.lora.targets}) if forward.lora else 0
    adapters *= forward.sizes.matmul
    return mixed + norms + residual + adapters + attention_bytes(forward, layer) + mlp_bytes(forward, layer)


def attention_bytes(forward: ForwardPass, layer: int) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the attention of block ``layer``.

    Counts from the output of ``c_attn`` to the input of ``c_proj``.
    """
    config, each, kernel = forward.config, forward.matmul // forward.split, attention_kernel(forward)
    projected = each if forward.trains("attn.c_proj") else 0  # the input of c_proj
    if not inputs_with_gradient(forward.lora, layer)["attn.c_proj"]:
        return projected
    is_transformed = config.positions != "learned" or config.qk_norm  # queries and keys are new tensors
    mixes = config.num_extra_values(layer) > 0  # values are new tensors, too
    mixers = mixes or (config.value_residual and layer == 0)  # whose weights, if trained, need the values
    # the output of c_attn; with "flash", queries, keys and values are views of it unless they are new tensors
    is_float32 = config.qk_norm and forward.sizes.matmul < 4 and not forward.on_gpu  # QK-norm is computed in float32
    uses_whole = (config.qk_norm and not is_float32) or (mixers and forward.lora is None)
    uses_whole = uses_whole or (kernel == "flash" and not (mixes and is_transformed))
    kept = 3 * each if uses_whole else 0
    match kernel:
        case "flash":
            log_sums = forward.tokens * config.n_head // forward.split * STATISTIC
            kept += each + log_sums + (2 * each + projected if is_transformed else 0) + (each if mixes else 0)
        case "matmuls":
            kept += 3 * each + projected + _weights(forward) + config.block_size**2  # the mask
        case "plain":
            kept += 3 * each * 4 // forward.sizes.matmul + projected + _weights(forward)
    if config.qk_norm:
        kept += 2 * forward.tokens * config.n_head // forward.split * STATISTIC
        kept += 2 * each * 4 // forward.sizes.matmul if is_float32 else 0
    if not forward.on_gpu and not config.is_global(layer) and kernel != "matmuls":
        kept += config.block_size**2 * forward.sizes.matmul  # the additive mask
    return kept


def mlp_bytes(forward: ForwardPass, layer: int) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the MLP of block ``layer``.

    Counts from the output of ``c_fc`` to the input of ``c_proj``.
    """
    inner = 4 * forward.matmul // forward.split  # the activation saves its input (GELU) or output (ReLU)
    if forward.compiled:
        return inner
    return inner * (inputs_with_gradient(forward.lora, layer)["mlp.c_proj"] + forward.trains("mlp.c_proj"))


def head_bytes(forward: ForwardPass, chunk: int | None) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of the head and the loss.

    Args:
        forward: Forward pass.
        chunk: Number of tokens whose logits are computed at a time, or None for all.
    """
    config, tokens, is_trained = forward.config, forward.tokens, forward.lora is None
    if chunk is not None and chunk < tokens:  # the gradients, which are computed in the forward pass
        matrix = config.padded_vocab_size * config.n_embd * forward.sizes.weight if is_trained else 0
        return forward.matmul + matrix
    states = forward.matmul if is_trained else 0
    if forward.compiled:  # log-softmax is recomputed from the logits
        return states + tokens * INDEX + tokens * config.padded_vocab_size * forward.sizes.matmul
    capped = tokens * config.known_vocab_size * forward.sizes.matmul if config.logit_soft_cap else 0
    return states + tokens * INDEX + capped + tokens * config.known_vocab_size * STATISTIC


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
    if forward.lora is not None:
        blocks += lora_count(config, forward.lora)
        needed = inputs_with_gradient(forward.lora, 0)
        for inner, outer, name in ((*LINEAR_WIDTHS[name], name) for name in needed if not needed[name]):
            blocks -= inner * outer * config.n_embd**2
            blocks -= inner * config.n_embd * forward.lora.rank if name in forward.lora.targets else 0
    return blocks * sizes.matmul + head_copy_bytes(forward, chunk)


def head_copy_bytes(forward: ForwardPass, chunk: int | None) -> int:
    """Returns the number of bytes of autocast's copy of the head; arguments as in ``weight_copy_bytes``."""
    config, sizes = forward.config, forward.sizes
    is_copied = sizes.weight != sizes.matmul and (chunk is None or chunk >= forward.tokens)
    return is_copied * config.padded_vocab_size * config.n_embd * sizes.matmul


def _norm(forward: ForwardPass) -> int:
    """Returns the number of bytes that autograd saves for the backward pass of a norm.

    Counts its input and statistics and, for an unfused RMSNorm, intermediate results.
    """
    if forward.config.norm == "layer":
        return forward.stream + 2 * forward.tokens * STATISTIC
    if forward.on_gpu or forward.compiled:
        return forward.stream + forward.tokens * STATISTIC
    tensors = 2 if forward.lora is None else 1  # the normalized input is only needed for the gradient of the weight
    return tensors * forward.tokens * forward.config.n_embd * 4 + forward.tokens * STATISTIC


def _dropout_mask(forward: ForwardPass, numbers: int, size: int) -> int:
    """Returns the number of bytes of a dropout mask: one byte per element on a GPU, ``size`` bytes on a CPU."""
    return numbers * (1 if forward.on_gpu else size)


def attention_kernel(forward: ForwardPass) -> Literal["flash", "matmuls", "plain"]:
    """Returns the kernel that ``gptlab.model.kernels.attend`` chooses."""
    if forward.on_gpu:
        return "flash"
    if forward.sizes.matmul == 4 and forward.config.block_size <= SHORT_SEQUENCE:
        return "matmuls"
    return "plain" if forward.config.dropout else "flash"  # torch's CPU kernel has no dropout


def attention_weight_bytes(forward: ForwardPass) -> int:
    """Returns the number of bytes of the attention weights of a block, (B, nh, T, T) in float32."""
    config = forward.config
    return forward.batch * config.n_head // forward.split * config.block_size**2 * 4


def _weights(forward: ForwardPass) -> int:
    """Returns the number of bytes of all attention weights and, with dropout, of the mask and the result."""
    return attention_weight_bytes(forward) * (3 if forward.config.dropout else 1)
