"""Configuration of the model, its parameter counts and its FLOPs. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    Tag,
    model_validator,
)

from gptlab.config.base import ComponentConfig, FrozenConfig, component_or_built_in
from gptlab.config.components import Component, ComponentChoice, is_component

COMPONENT_FIELDS = ("block", "attention", "activation", "norm")  # may be components
WIRED_OPTIONS = ("value_residual", "value_embeddings", "x0_skips", "unet_skips")  # connect blocks with each other
NORM_EPSILON = 1e-5  # GPT-2's layer_norm_epsilon
GPT2_ACTIVATIONS = ("gelu", "gelu_tanh")  # implemented in gptlab.model.gpt; the others are in gptlab.model.modern


@dataclass(frozen=True)
class Option:
    """Metadata of a field of ``GPTConfig``, from which the constants below that class are derived.

    Attributes:
        kind: "size" options differ between the sizes of GPT-2. Other programs record them in their files. "variant"
            options are also recorded there, but are not sizes. "modern" options were introduced after GPT-2.
            "unrecorded" options are not recorded by other programs, because they do not change the output of a trained
            GPT-2.
        gpt2: Value in GPT-2; None for a size.
        shapes_weights: Whether models with different values have parameters of different names or shapes.
            ``block_size`` is compared separately, because a longer one can be cropped.
    """

    kind: Literal["size", "variant", "modern", "unrecorded"]
    gpt2: Any = None
    shapes_weights: bool = False


MAX_LAYERS = 10_000  # ten times the deepest published transformer; a stored configuration may come from somebody else
Size = Annotated[PositiveInt, Field(lt=2**31), Option("size", shapes_weights=True)]


class ParameterCounts(NamedTuple):
    """Counted parameters of a model.

    Attributes:
        parts: Number of parameters of each part of the model: wte, wpe, h (all blocks), ln_f and others.
        matrices: Number of parameters of the matrices of all blocks.
    """

    parts: dict[str, int]
    matrices: int


class GPTConfig(FrozenConfig):
    """Size and architecture of a GPT-2 class decoder.

    Attributes:
        block_size: Maximum context length T in tokens.
        vocab_size: Vocabulary size V; None until the tokenizer is known.
        n_layer: Number of residual blocks L.
        n_head: Number of attention heads nh per block; must divide ``n_embd``.
        n_embd: Embedding width C.
        bias: Whether the linear layers and LayerNorms have biases, as in GPT-2.
        dropout: Dropout probability of the embedding, the attention weights and both residual branches.
        activation: "gelu_tanh" is the tanh approximation of GELU, as in OpenAI's GPT-2; "gelu" is the exact GELU, as in
            nanoGPT; "relu_squared" is from So et al. 2021 (Primer), section 4.1. Or a component.
        norm: "layer" for LayerNorm, "rms" for RMSNorm (Zhang and Sennrich 2019). Or a component.
        positions: "learned" is a positional embedding, as in GPT-2; "rotary" rotates queries and keys (Su et al. 2021,
            RoFormer, section 3.2); "rotary_half" rotates only half of the channel pairs of each head (Jordan et al.
            2024, modded-nanogpt).
        rope_base: Base of the rotary frequencies.
        qk_norm: RMS-normalize the queries and keys of each head (Henry et al. 2020).
        embedding_norm: Normalize the embedding before the first block (modded-nanogpt).
        zero_init: Initialize the projections (both ``c_proj``, and an untied ``lm_head``) to zero, so that every block
            starts as the identity (Zhang et al. 2019, Fixup; Yang et al. 2022, muP, for the head).
        logit_soft_cap: Limit the absolute value of logits to this with tanh (Gemma Team 2024, Gemma 2, section 2); None
            for no limit.
        value_residual: Mix the first block's values into those of all later blocks (Zhou et al. 2024, Value Residual
            Learning).
        value_embeddings: Number of value embeddings. This many of the first blocks and as many of the last mix an
            embedding of the token into their values. The first block shares its embedding with the last block, the
            second with the second to last, and so on (modded-nanogpt).
        x0_skips: Mix the embedding into the input of every block (modded-nanogpt).
        unet_skips: Add the outputs of the first half of the blocks to the inputs of the second half, in mirrored order
            (Ronneberger et al. 2015; modded-nanogpt).
        attention_window: Number of tokens that a token attends to, including itself (sliding window, Beltagy et al.
            2020, section 3.1); None for no limit.
        global_every: With ``attention_window``, every n-th block and the last block attend to all earlier tokens.
        tie_weights: Whether ``lm_head`` shares its weight with ``wte``.
        pad_vocab_to_multiple_of: Pad the rows of the embedding to a multiple of this. The padding is zero, and never
            scored, sampled or exported. "auto" is 1, unless the configuration of a run resolves it for a GPU.
        resize_embeddings: Whether ``init_from`` may have another vocabulary: rows are dropped from the end of the
            embedding and of an untied head, or added with the mean of the others.
        activation_checkpointing: Recompute each block in the backward pass instead of storing its activations.
        block: Component to use instead of the built-in block; see ``gptlab.model.modern``.
        attention: Component to use instead of the built-in attention; see ``gptlab.model.modern``.
    """

    block_size: Annotated[PositiveInt, Field(lt=2**31), Option("size")]
    vocab_size: Annotated[Annotated[PositiveInt, Field(lt=2**31)] | None, Option("size", shapes_weights=True)]
    n_layer: Annotated[PositiveInt, Field(le=MAX_LAYERS), Option("size", shapes_weights=True)]
    n_head: Size
    n_embd: Size
    bias: Annotated[bool, Option("variant", True, shapes_weights=True)]
    dropout: Annotated[float, Field(ge=0, lt=1), Option("unrecorded", 0.0)]
    activation: Annotated[
        Literal["gelu", "gelu_tanh", "relu_squared"] | ComponentChoice, Option("variant", "gelu_tanh")
    ]
    norm: Annotated[Literal["layer", "rms"] | ComponentChoice, Option("modern", "layer", shapes_weights=True)]
    positions: Annotated[Literal["learned", "rotary", "rotary_half"], Option("modern", "learned", shapes_weights=True)]
    rope_base: Annotated[PositiveFloat, Option("unrecorded", 10000)]
    qk_norm: Annotated[bool, Option("modern", False)]
    embedding_norm: Annotated[bool, Option("modern", False, shapes_weights=True)]
    zero_init: Annotated[bool, Option("unrecorded", False)]
    logit_soft_cap: Annotated[PositiveFloat | None, Option("modern", None)]
    value_residual: Annotated[bool, Option("modern", False, shapes_weights=True)]
    value_embeddings: Annotated[NonNegativeInt, Option("modern", 0, shapes_weights=True)]
    x0_skips: Annotated[bool, Option("modern", False, shapes_weights=True)]
    unet_skips: Annotated[bool, Option("modern", False, shapes_weights=True)]
    attention_window: Annotated[PositiveInt | None, Option("modern", None)]
    global_every: Annotated[PositiveInt, Option("unrecorded", 1)]
    tie_weights: Annotated[bool, Option("variant", True, shapes_weights=True)]
    pad_vocab_to_multiple_of: Annotated[
        Annotated[PositiveInt, Field(lt=2**31)] | Literal["auto"], Option("unrecorded", 1, shapes_weights=True)
    ]
    resize_embeddings: Annotated[bool, Option("unrecorded", False)] = False  # runs of earlier versions do not have it
    activation_checkpointing: Annotated[bool, Option("unrecorded", False)]
    block: Annotated[Component, Option("modern")] = None
    attention: Annotated[Component, Option("modern")] = None

    _counts: "ParameterCounts | None" = PrivateAttr(None)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            small = [h for h in range(1, math.isqrt(self.n_embd) + 1) if self.n_embd % h == 0]
            divisors = {*small, *(self.n_embd // h for h in small)}
            below = max(h for h in divisors if h < self.n_head)
            above = min((h for h in divisors if h > self.n_head), default=None)
            raise ValueError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}. "
                f"Nearest divisors: {below}{f' and {above}' if above else ''}"
            )
        return self

    @model_validator(mode="after")
    def _rotary_pairs(self) -> Self:
        pairs = {"learned": 1, "rotary": 2, "rotary_half": 4}[self.positions]
        if self.head_size % pairs:
            raise ValueError(
                f"positions={self.positions} needs a head size that is a multiple of {pairs}, but "
                f"n_embd={self.n_embd} / n_head={self.n_head} is {self.head_size}"
            )
        return self

    @model_validator(mode="after")
    def _value_embeddings_fit(self) -> Self:
        if 2 * self.value_embeddings > self.n_layer:
            raise ValueError(
                f"value_embeddings={self.value_embeddings} needs two blocks per value embedding, but "
                f"n_layer={self.n_layer}. The maximum is value_embeddings={self.n_layer // 2}"
            )
        return self

    @model_validator(mode="after")
    def _components_fit(self) -> Self:
        for name in ("block", "attention"):
            wired = [option for option in WIRED_OPTIONS if getattr(self, option)]
            if getattr(self, name) is not None and wired:
                raise ValueError(
                    f"{wired[0]}={getattr(self, wired[0])} is not supported if {name} is a component, because it gets "
                    "neither skip connections nor values of other blocks"
                )
        parts = [name for name in COMPONENT_FIELDS if name != "block" and is_component(getattr(self, name))]
        if self.block is not None and parts:
            raise ValueError(f"{parts[0]} cannot be a component if block is one, which builds its own {parts[0]}")
        return self

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """The parts of the model that are components, by field name."""
        return {name: value for name in COMPONENT_FIELDS if is_component(value := getattr(self, name))}

    @property
    def counts(self) -> "ParameterCounts | None":
        """Counted parameters of a model with components; None if ``with_counts`` has not set them."""
        return self._counts

    def with_counts(self, counts: "ParameterCounts") -> Self:
        """Returns a copy with counted parameters, which replace the formulas below."""
        counted = self.model_copy()
        counted._counts = counts  # noqa: SLF001  (its own)
        return counted

    @property
    def head_size(self) -> int:
        """Width hs of an attention head."""
        return self.n_embd // self.n_head

    @property
    def has_gpt2_options(self) -> bool:
        """Whether ``GPT`` implements all options: none was introduced after GPT-2 or is a component."""
        modern = any(getattr(self, name) != value for name, value in GPT2_OPTIONS.items())
        return not (modern or self.zero_init or self.activation not in GPT2_ACTIVATIONS)

    @property
    def is_gpt2(self) -> bool:
        """Whether this is GPT-2: it has only the options of GPT-2, and no components."""
        return self.has_gpt2_options and not self.components

    def is_global(self, layer: int) -> bool:
        """Returns whether block ``layer``, counted from 0, attends to all earlier tokens."""
        return self.attention_window is None or (layer + 1) % self.global_every == 0 or layer == self.n_layer - 1

    def value_embedding(self, layer: int) -> int | None:
        """Returns the index of the value embedding that block ``layer``, counted from 0, mixes in, or None."""
        index = min(layer, self.n_layer - 1 - layer)
        return index if index < self.value_embeddings else None

    def num_extra_values(self, layer: int) -> int:
        """Returns the number of values that block ``layer``, counted from 0, mixes into its own."""
        return (self.value_residual and layer > 0) + (self.value_embedding(layer) is not None)

    def has_skip(self, layer: int) -> bool:
        """Returns whether block ``layer``, counted from 0, receives the output of its mirrored block (U-Net skip)."""
        return self.unet_skips and 2 * layer >= self.n_layer + self.n_layer % 2

    @property
    def known_vocab_size(self) -> int:
        """Vocabulary size V. Raises ValueError if it is not known yet."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet. It is set from the tokenizer")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding: V rounded up to a multiple of ``pad_vocab_to_multiple_of``."""
        multiple = 1 if self.pad_vocab_to_multiple_of == "auto" else self.pad_vocab_to_multiple_of
        return -(-self.known_vocab_size // multiple) * multiple


class ComponentModelConfig(GPTConfig, ComponentConfig):
    """Configuration of a model that is a component: also has ``_target_`` and further arguments of its class."""

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """The model, by the name "", and its parts that are components, by field name."""
        return {"": self.component, **super().components}


ModelConfig = Annotated[
    Annotated[GPTConfig, Tag("built_in")] | Annotated[ComponentModelConfig, Tag("component")],
    Discriminator(component_or_built_in),
]


def read_model_config(values: Any) -> GPTConfig:
    """Validates the stored configuration of a model; raises pydantic's ValidationError if it is invalid."""
    is_own = component_or_built_in(values) == "component"
    return (ComponentModelConfig if is_own else GPTConfig).model_validate(values)


OPTIONS = {
    name: option
    for name, field in GPTConfig.model_fields.items()
    for option in field.metadata
    if isinstance(option, Option)
}
GPT2_OPTIONS = {name: option.gpt2 for name, option in OPTIONS.items() if option.kind == "modern"}
EXTERNAL_DEFAULTS = {name: option.gpt2 for name, option in OPTIONS.items() if option.kind == "unrecorded"}
SHAPE_KEYS = tuple(name for name, option in OPTIONS.items() if option.shapes_weights)


class LoRAConfig(FrozenConfig):
    """Low-rank adaptation (Hu et al. 2022, section 4.1) of a trained model.

    Attributes:
        rank: Rank r of the updates.
        alpha: Scaling: the updates are multiplied by alpha / r.
        targets: Linear layers of every block that are adapted.
    """

    rank: PositiveInt
    alpha: PositiveFloat
    targets: Annotated[list[Literal["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]], Field(min_length=1)]


# A larger number of texts or tokens is a mistake: each text has a KV cache, and each token needs a forward pass
NumSamples = Annotated[PositiveInt, Field(le=100_000)]
NumNewTokens = Annotated[PositiveInt, Field(le=1_000_000)]


class SamplingConfig(FrozenConfig):
    """Sampling parameters, applied in the order repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: Divides the logits; 0 selects the most likely token.
        top_k: Sample only from the k most likely tokens (Fan et al. 2018, section 5.1); None for all tokens.
        top_p: Sample only from the smallest set of most likely tokens whose total probability is at least this
            (Holtzman et al. 2020, section 3.1); None for all tokens.
        min_p: Sample only from tokens whose probability is at least this fraction of the largest one (Nguyen et al.
            2024, section 3); None for all tokens.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that are already in the
            text (Keskar et al. 2019, CTRL, section 4.1); 1 disables it.
    """

    temperature: NonNegativeFloat
    top_k: PositiveInt | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)]


# Widths of input and output of the linear layers of a block, as multiples of C, in the order of the forward pass
LINEAR_WIDTHS = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}


def lora_count(config: GPTConfig, lora: LoRAConfig) -> int:
    """Counts the parameters that LoRA trains."""
    sides = sum(sum(LINEAR_WIDTHS[target]) for target in set(lora.targets))
    return config.n_layer * lora.rank * config.n_embd * sides


def inputs_with_gradient(lora: LoRAConfig | None, layer: int) -> dict[str, bool]:
    """Returns for each linear layer of block ``layer``, counted from 0, whether its input needs a gradient.

    With LoRA, the embeddings are frozen, so the backward pass ends at the first adapted layer of the first block.
    """
    needed, reached = {}, lora is None or layer > 0
    for name in LINEAR_WIDTHS:
        needed[name] = reached
        reached = reached or lora is None or name in lora.targets
    return needed


def describe_lora(config: GPTConfig, lora: LoRAConfig | None) -> str:
    """Returns the number of LoRA parameters as text that follows the number of the model's; "" without LoRA."""
    return f", plus {lora_count(config, lora):,} trained LoRA parameters (rank {lora.rank})" if lora else ""


def parameter_count(config: GPTConfig) -> int:
    """Counts all trainable parameters, including the padding of the vocabulary; a tied head is counted once."""
    if config.counts is not None:
        return sum(config.counts.parts.values())
    C, L = config.n_embd, config.n_layer  # noqa: N806
    matrices = 3 * C * C + C * C + 4 * C * C + 4 * C * C  # attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
    biases = 3 * C + C + 4 * C + C
    norm = 2 * C if config.bias and config.norm == "layer" else C
    block = matrices + (biases if config.bias else 0) + 2 * norm
    return embedding_count(config) + L * block + norm * (1 + config.embedding_norm) + _mix_count(config)


def embedding_count(config: GPTConfig) -> int:
    """Counts the parameters of the embeddings and of an untied head, i.e. all but the "non-embedding parameters".

    Source: Kaplan et al. 2020, section 2.1.
    """
    head = 0 if config.tie_weights else config.padded_vocab_size * config.n_embd
    return _lookup_count(config) + head


def flops_per_token(config: GPTConfig, lora: LoRAConfig | None = None) -> int:
    """Returns the floating-point operations per training token, forward and backward.

    6 N + 12 L nh hs T, where N is the number of parameters used in matmuls, without embedding lookups. Source:
    Chowdhery et al. 2022 (PaLM), appendix B. In blocks with a sliding window, T is the window size. Recomputed
    activations are not counted.

    A third of 6 N is the forward pass, a third are the gradients of the inputs, and a third are those of the weights
    (Kaplan et al. 2020, section 2.1). With LoRA, frozen weights have no gradient: 4 N + 6 M + 12 L nh hs T for M
    trained parameters, less the gradients of the first block's inputs that are not needed (``inputs_with_gradient``).
    """
    multiplied = parameter_count(config) - _lookup_count(config)
    if config.tie_weights:
        multiplied += config.padded_vocab_size * config.n_embd
    attention = 12 * config.n_embd * sum(_num_keys(config, layer) for layer in range(config.n_layer))
    if lora is None:
        return 6 * multiplied + attention
    return 4 * multiplied + 6 * lora_count(config, lora) + attention - _unneeded_flops(config, lora)


def forward_flops_per_token(config: GPTConfig, lora: LoRAConfig | None = None) -> int:
    """Returns the floating-point operations per evaluated token: those of the forward pass."""
    return flops_per_token(config) // 3 + (2 * lora_count(config, lora) if lora else 0)


def _num_keys(config: GPTConfig, layer: int) -> int:
    """Returns the number of tokens that block ``layer`` attends to: the window size or the block size."""
    window = None if config.is_global(layer) else config.attention_window
    return min(window or config.block_size, config.block_size)


def _unneeded_flops(config: GPTConfig, lora: LoRAConfig) -> int:
    """Returns the FLOPs per token of input gradients that LoRA does not need, in the first block."""
    C, unneeded = config.n_embd, 0  # noqa: N806
    needed = inputs_with_gradient(lora, 0)
    for name in (name for name, is_needed in needed.items() if not is_needed):
        inner, outer = LINEAR_WIDTHS[name]
        unneeded += 2 * inner * outer * C * C + (2 * inner * C * lora.rank if name in lora.targets else 0)
    return unneeded + (0 if needed["attn.c_proj"] else 8 * C * _num_keys(config, 0))


def _lookup_count(config: GPTConfig) -> int:
    """Counts the parameters of the embedding tables, in which a token looks up one row each."""
    positions = config.block_size if config.positions == "learned" else 0
    return ((1 + config.value_embeddings) * config.padded_vocab_size + positions) * config.n_embd


def _mix_count(config: GPTConfig) -> int:
    """Counts the mixing weights of the blocks: two per x0 skip, one per U-Net skip, one per value in a mix."""
    layers = range(config.n_layer)
    extra_values = [config.num_extra_values(layer) for layer in layers]
    return (
        2 * config.n_layer * config.x0_skips
        + sum(config.has_skip(layer) for layer in layers)
        + sum(1 + number for number in extra_values if number)
    )
