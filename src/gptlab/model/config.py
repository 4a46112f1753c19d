"""What a GPT is made of, and what follows from that alone: parameter counts and FLOPs. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptlab.config.base import FrozenConfig

NORM_EPSILON = 1e-5  # GPT-2's layer_norm_epsilon
GPT2_OPTIONS = {  # of what was found since, which a GPT-2 that is trained already has or has not
    "norm": "layer",
    "positions": "learned",
    "qk_norm": False,
    "embedding_norm": False,
    "logit_soft_cap": None,
    "value_residual": False,
    "value_embeddings": 0,
    "x0_skips": False,
    "unet_skips": False,
    "attention_window": None,
}


class GPTConfig(FrozenConfig):
    """The shape and the options of a GPT-2 class decoder.

    Attributes:
        block_size: Longest context T, in tokens.
        vocab_size: Vocabulary size V; None until the tokenizer is known.
        n_layer: Number of residual blocks L.
        n_head: Attention heads nh of a block; must divide ``n_embd``.
        n_embd: Width C.
        bias: Whether the linear layers and LayerNorms carry biases (GPT-2 does).
        dropout: Dropout probability on the embedding, the attention weights and both residual branches.
        activation: "gelu_tanh" is OpenAI's GPT-2, "gelu" the exact form nanoGPT trains with; "relu_squared" is that of
            So et al. 2021 (Primer), section 4.1.
        norm: "layer" is LayerNorm, "rms" RMSNorm (Zhang and Sennrich 2019).
        positions: "learned" embeds them (GPT-2); "rotary" turns queries and keys by them (Su et al. 2021, RoFormer,
            section 3.2); "rotary_half" turns half of each head only, the faster half of the frequencies (Jordan et al.
            2024, modded-nanogpt).
        rope_base: Base of the rotary frequencies.
        qk_norm: Bring queries and keys to one length before they meet (Henry et al. 2020, by RMS).
        embedding_norm: Normalise the embedding before the first block (modded-nanogpt).
        zero_init: Begin with projections (both ``c_proj``, an untied ``lm_head``) at zero, every block as the identity
            (Zhang et al. 2019, Fixup; Yang et al. 2022, muP, for the head).
        logit_soft_cap: Bend logits to within this by tanh (Gemma Team 2024, Gemma 2, section 2); None leaves them.
        value_residual: Mix the first block's values into those of all (Zhou et al. 2024, Value Residual Learning).
        value_embeddings: So many of the first and of the last blocks mix an embedding of the token into their values;
            the first block shares it with the last, and so on (modded-nanogpt).
        x0_skips: Mix the embedding into the input of every block (modded-nanogpt).
        unet_skips: Add the output of the first blocks to the input of the last ones, in mirrored order (Ronneberger et
            al. 2015; modded-nanogpt).
        attention_window: Tokens that a position sees, itself included (Beltagy et al. 2020, section 3.1); None: all.
        global_every: Every so manyth block sees everything whatever the window; the last one always does.
        tie_weights: Whether ``lm_head`` shares its matrix with ``wte``.
        pad_vocab_to_multiple_of: The embedding gets rows up to a multiple of this; the extra ones are never scored,
            sampled or exported.
        activation_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """

    block_size: PositiveInt
    vocab_size: PositiveInt | None
    n_layer: PositiveInt
    n_head: PositiveInt
    n_embd: PositiveInt
    bias: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    activation: Literal["gelu", "gelu_tanh", "relu_squared"]
    norm: Literal["layer", "rms"]
    positions: Literal["learned", "rotary", "rotary_half"]
    rope_base: PositiveFloat
    qk_norm: bool
    embedding_norm: bool
    zero_init: bool
    logit_soft_cap: PositiveFloat | None
    value_residual: bool
    value_embeddings: NonNegativeInt
    x0_skips: bool
    unet_skips: bool
    attention_window: PositiveInt | None
    global_every: PositiveInt
    tie_weights: bool
    pad_vocab_to_multiple_of: PositiveInt
    activation_checkpointing: bool

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
                f"value_embeddings={self.value_embeddings} are for as many of the first and of the last blocks, and "
                f"n_layer={self.n_layer} has not so many; at most {self.n_layer // 2}"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width hs of an attention head."""
        return self.n_embd // self.n_head

    def sees_everything(self, layer: int) -> bool:
        """Whether a block, counted from 0, is not bound to the window."""
        return self.attention_window is None or (layer + 1) % self.global_every == 0 or layer == self.n_layer - 1

    def value_embedding(self, layer: int) -> int | None:
        """Number of the value embedding that a block, counted from 0, mixes in; None where it has none."""
        from_the_end = min(layer, self.n_layer - 1 - layer)
        return from_the_end if from_the_end < self.value_embeddings else None

    def has_skip(self, layer: int) -> bool:
        """Whether a block, counted from 0, is given the output of its mirror image among the first."""
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


class LoRAConfig(FrozenConfig):
    """Low-rank adaptation (Hu et al. 2022, section 4.1), of a network whose weights are learnt already.

    Attributes:
        rank: Of what is learnt, r.
        alpha: What is learnt counts alpha / r times.
        targets: Linear layers of every block.
    """

    rank: PositiveInt
    alpha: PositiveFloat
    targets: Annotated[list[Literal["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]], Field(min_length=1)]


def lora_count(config: GPTConfig, lora: LoRAConfig) -> int:
    """Count the parameters that LoRA trains."""
    widths = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    sides = sum(sum(widths[target]) for target in set(lora.targets))
    return config.n_layer * lora.rank * config.n_embd * sides


def parameter_count(config: GPTConfig) -> int:
    """Count every trainable parameter, the padding of the vocabulary included and a tied head once."""
    C, L = config.n_embd, config.n_layer  # noqa: N806
    matrices = 3 * C * C + C * C + 4 * C * C + 4 * C * C  # attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
    biases = 3 * C + C + 4 * C + C
    norm = 2 * C if config.bias and config.norm == "layer" else C
    block = matrices + (biases if config.bias else 0) + 2 * norm
    return _looked_up(config) + _head(config) + L * block + norm * (1 + config.embedding_norm) + _mixed(config)


def embedding_count(config: GPTConfig) -> int:
    """Count the parameters of embeddings and of an untied head, which "non-embedding parameters" are without.

    Source: Kaplan et al. 2020, section 2.1.
    """
    return _looked_up(config) + _head(config)


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of one training token, forward and backward.

    6 N + 12 L nh hs T, with N the parameters that are multiplied (no embedding that is only looked up). Source:
    Chowdhery et al. 2022 (PaLM), appendix B. Blocks with a window have its width for T. Recomputed activations do not
    count.
    """
    multiplied = parameter_count(config) - _looked_up(config)
    if config.tie_weights:
        multiplied += config.padded_vocab_size * config.n_embd
    window = min(config.attention_window or config.block_size, config.block_size)
    seen = sum(config.block_size if config.sees_everything(layer) else window for layer in range(config.n_layer))
    return 6 * multiplied + 12 * config.n_embd * seen


def _looked_up(config: GPTConfig) -> int:
    """Count the parameters of embeddings, of which a token takes a row."""
    positions = config.block_size if config.positions == "learned" else 0
    return ((1 + config.value_embeddings) * config.padded_vocab_size + positions) * config.n_embd


def _head(config: GPTConfig) -> int:
    return 0 if config.tie_weights else config.padded_vocab_size * config.n_embd


def _mixed(config: GPTConfig) -> int:
    """Count the learnt weights with which a block mixes what it is given: two of x0, one of a skip, those of values."""
    layers = range(config.n_layer)
    of_values = (config.value_residual * (n > 0) + (config.value_embedding(n) is not None) for n in layers)
    return (
        2 * config.n_layer * config.x0_skips
        + sum(config.has_skip(layer) for layer in layers)
        + sum(1 + number for number in of_values if number)
    )
