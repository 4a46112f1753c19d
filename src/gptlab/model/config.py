"""Configuration of the model, and what follows from it alone: parameter counts and FLOPs. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptlab.config.base import FrozenConfig

NORM_EPSILON = 1e-5  # GPT-2's layer_norm_epsilon
GPT2_ACTIVATIONS = ("gelu", "gelu_tanh")  # gptlab.model.gpt has them; others are in gptlab.model.modern


@dataclass(frozen=True)
class Option:
    """Metadata of a field of ``GPTConfig``, from which the constants below it are derived.

    Attributes:
        kind: "size": GPT-2 comes in several, and files of other programs give it; "variant": these files give it, too;
            "modern": found since GPT-2; "unrecorded": other programs do not record it, since it does not change what a
            trained GPT-2 computes.
        gpt2: Its value in GPT-2; None for a size.
        shapes_weights: Whether weights of one value do not fit a model of another. A longer block can be cropped, so
            ``block_size`` is compared by itself.
    """

    kind: Literal["size", "variant", "modern", "unrecorded"]
    gpt2: Any = None
    shapes_weights: bool = False


Size = Annotated[PositiveInt, Option("size", shapes_weights=True)]


class GPTConfig(FrozenConfig):
    """The shape and the options of a GPT-2 class decoder.

    Attributes:
        block_size: Longest context T, in tokens.
        vocab_size: Vocabulary size V; None until the tokenizer is known.
        n_layer: Number of residual blocks L.
        n_head: Attention heads nh of a block; must divide ``n_embd``.
        n_embd: Width C.
        bias: Whether the linear layers and LayerNorms have biases (GPT-2 does).
        dropout: Dropout probability on the embedding, the attention weights and both residual branches.
        activation: "gelu_tanh" is OpenAI's GPT-2, "gelu" the exact form nanoGPT trains with; "relu_squared" is that of
            So et al. 2021 (Primer), section 4.1.
        norm: "layer" is LayerNorm, "rms" RMSNorm (Zhang and Sennrich 2019).
        positions: "learned" embeds them (GPT-2); "rotary" rotates queries and keys (Su et al. 2021, RoFormer, section
            3.2); "rotary_half" rotates half of each head only, the faster half of the frequencies (Jordan et al. 2024,
            modded-nanogpt).
        rope_base: Base of the rotary frequencies.
        qk_norm: RMS-normalize queries and keys of each head (Henry et al. 2020).
        embedding_norm: Normalize the embedding before the first block (modded-nanogpt).
        zero_init: Start with projections (both ``c_proj``, an untied ``lm_head``) at zero, every block as the identity
            (Zhang et al. 2019, Fixup; Yang et al. 2022, muP, for the head).
        logit_soft_cap: Limit logits to this by tanh (Gemma Team 2024, Gemma 2, section 2); None does not.
        value_residual: Mix the first block's values into those of all (Zhou et al. 2024, Value Residual Learning).
        value_embeddings: So many of the first and of the last blocks mix an embedding of the token into their values;
            the first block shares it with the last, and so on (modded-nanogpt).
        x0_skips: Mix the embedding into the input of every block (modded-nanogpt).
        unet_skips: Add the output of the first blocks to the input of the last ones, in mirrored order (Ronneberger et
            al. 2015; modded-nanogpt).
        attention_window: Tokens that a position sees, itself included (Beltagy et al. 2020, section 3.1); None: all.
        global_every: With a window, every n-th block sees all earlier tokens; the last one always does.
        tie_weights: Whether ``lm_head`` shares its matrix with ``wte``.
        pad_vocab_to_multiple_of: The embedding gets rows up to a multiple of this; the extra ones are never scored,
            sampled or exported.
        activation_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """

    block_size: Annotated[PositiveInt, Option("size")]
    vocab_size: Annotated[PositiveInt | None, Option("size", shapes_weights=True)]
    n_layer: Size
    n_head: Size
    n_embd: Size
    bias: Annotated[bool, Option("variant", True, shapes_weights=True)]
    dropout: Annotated[float, Field(ge=0, lt=1), Option("unrecorded", 0.0)]
    activation: Annotated[Literal["gelu", "gelu_tanh", "relu_squared"], Option("variant", "gelu_tanh")]
    norm: Annotated[Literal["layer", "rms"], Option("modern", "layer", shapes_weights=True)]
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
    pad_vocab_to_multiple_of: Annotated[PositiveInt, Option("unrecorded", 1, shapes_weights=True)]
    activation_checkpointing: Annotated[bool, Option("unrecorded", False)]

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            divisors = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            below = max(h for h in divisors if h < self.n_head)
            above = min((h for h in divisors if h > self.n_head), default=None)
            raise ValueError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}; "
                f"the nearest that do: {below}{f' and {above}' if above else ''}"
            )
        return self

    @model_validator(mode="after")
    def _rotary_pairs(self) -> Self:
        pairs = {"learned": 1, "rotary": 2, "rotary_half": 4}[self.positions]
        if self.head_size % pairs:
            raise ValueError(
                f"positions={self.positions} turns the parts of a head in pairs: n_embd={self.n_embd} over "
                f"n_head={self.n_head} makes heads of {self.head_size}, which is no multiple of {pairs}"
            )
        return self

    @model_validator(mode="after")
    def _two_ends(self) -> Self:
        if 2 * self.value_embeddings > self.n_layer:
            raise ValueError(
                f"value_embeddings={self.value_embeddings} needs n_layer of at least {2 * self.value_embeddings}, one "
                f"block at each end for each of them, but n_layer={self.n_layer}; at most {self.n_layer // 2} fit"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width hs of an attention head."""
        return self.n_embd // self.n_head

    @property
    def is_gpt2(self) -> bool:
        """Whether ``gptlab.model.gpt.GPT`` is the model: no option in use that has been found since GPT-2."""
        modern = any(getattr(self, name) != value for name, value in GPT2_OPTIONS.items())
        return not (modern or self.zero_init or self.activation not in GPT2_ACTIVATIONS)

    def is_global(self, layer: int) -> bool:
        """Whether a block, counted from 0, sees all earlier tokens, whatever the window."""
        return self.attention_window is None or (layer + 1) % self.global_every == 0 or layer == self.n_layer - 1

    def value_embedding(self, layer: int) -> int | None:
        """Returns the index of the value embedding that a block, counted from 0, mixes in, or None."""
        from_the_end = min(layer, self.n_layer - 1 - layer)
        return from_the_end if from_the_end < self.value_embeddings else None

    def num_extra_values(self, layer: int) -> int:
        """Returns how many values a block, counted from 0, mixes into its own."""
        return (self.value_residual and layer > 0) + (self.value_embedding(layer) is not None)

    def has_skip(self, layer: int) -> bool:
        """Whether a block, counted from 0, gets the output of its mirrored block of the first half."""
        return self.unet_skips and 2 * layer >= self.n_layer + self.n_layer % 2

    @property
    def known_vocab_size(self) -> int:
        """The vocabulary size V, once it is known; ValueError before."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known yet: it is the tokenizer's")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: V rounded up to ``pad_vocab_to_multiple_of``."""
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.known_vocab_size // multiple) * multiple


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
        rank: Rank r of the update.
        alpha: The update is scaled by alpha / r.
        targets: Linear layers of every block.
    """

    rank: PositiveInt
    alpha: PositiveFloat
    targets: Annotated[list[Literal["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]], Field(min_length=1)]


class SamplingConfig(FrozenConfig):
    """How a token is drawn from the model's distribution; the filters apply in this order, from below.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw only from the k likeliest tokens (Fan et al. 2018, section 5.1); None: from all.
        top_p: Draw only from the likeliest tokens that together have this probability (Holtzman et al. 2020, section
            3.1); None: from all.
        min_p: Draw only from tokens at least this times as likely as the likeliest (Nguyen et al. 2024, section 3);
            None: from all.
        repetition_penalty: Divides the logits above 0, and multiplies those below, of tokens that the text already has
            (Keskar et al. 2019, CTRL, section 4.1), before all else; 1 leaves them.
    """

    temperature: NonNegativeFloat
    top_k: PositiveInt | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    repetition_penalty: PositiveFloat


def lora_count(config: GPTConfig, lora: LoRAConfig) -> int:
    """Counts the parameters that LoRA trains."""
    widths = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    sides = sum(sum(widths[target]) for target in set(lora.targets))
    return config.n_layer * lora.rank * config.n_embd * sides


def parameter_count(config: GPTConfig) -> int:
    """Counts every trainable parameter, including the padding of the vocabulary, and a tied head once."""
    C, L = config.n_embd, config.n_layer  # noqa: N806
    matrices = 3 * C * C + C * C + 4 * C * C + 4 * C * C  # attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
    biases = 3 * C + C + 4 * C + C
    norm = 2 * C if config.bias and config.norm == "layer" else C
    block = matrices + (biases if config.bias else 0) + 2 * norm
    return embedding_count(config) + L * block + norm * (1 + config.embedding_norm) + _mix_count(config)


def embedding_count(config: GPTConfig) -> int:
    """Counts the parameters of embeddings and of an untied head, which "non-embedding parameters" exclude.

    Source: Kaplan et al. 2020, section 2.1.
    """
    head = 0 if config.tie_weights else config.padded_vocab_size * config.n_embd
    return _lookup_count(config) + head


def flops_per_token(config: GPTConfig) -> int:
    """Returns the floating-point operations of one training token, forward and backward.

    6 N + 12 L nh hs T, with N the parameters of matrix products (no embedding that is only looked up). Source:
    Chowdhery et al. 2022 (PaLM), appendix B. Blocks with a window have its width for T. Recomputed activations do not
    count.
    """
    multiplied = parameter_count(config) - _lookup_count(config)
    if config.tie_weights:
        multiplied += config.padded_vocab_size * config.n_embd
    window = min(config.attention_window or config.block_size, config.block_size)
    keys = sum(config.block_size if config.is_global(layer) else window for layer in range(config.n_layer))
    return 6 * multiplied + 12 * config.n_embd * keys


def _lookup_count(config: GPTConfig) -> int:
    """Counts the parameters of embeddings, of which a token takes one row."""
    positions = config.block_size if config.positions == "learned" else 0
    return ((1 + config.value_embeddings) * config.padded_vocab_size + positions) * config.n_embd


def _mix_count(config: GPTConfig) -> int:
    """Counts the learned mixing weights of the blocks: two for x0, one for a skip, one for each of several values."""
    layers = range(config.n_layer)
    of_values = [config.num_extra_values(layer) for layer in layers]
    return (
        2 * config.n_layer * config.x0_skips
        + sum(config.has_skip(layer) for layer in layers)
        + sum(1 + number for number in of_values if number)
    )
