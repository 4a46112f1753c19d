"""What a GPT is made of, and what follows from that alone: parameter counts and FLOPs. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from gptlab.settings import Settings


class GPTConfig(Settings):
    """The shape and the options of a GPT-2 class decoder.

    Attributes:
        block_size: Longest context T, in tokens.
        vocab_size: Vocabulary size V; None until the tokenizer is known.
        n_layer: Number of residual blocks L.
        n_head: Attention heads nh of a block; must divide ``n_embd``.
        n_embd: Width C.
        bias: Whether the linear layers and LayerNorms carry biases (GPT-2 does).
        dropout: Dropout probability on the embedding, the attention weights and both residual branches.
        activation: "gelu_tanh" is OpenAI's GPT-2, "gelu" the exact form nanoGPT trains with.
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
    activation: Literal["gelu", "gelu_tanh"]
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


def parameter_count(config: GPTConfig) -> int:
    """Count every trainable parameter, the padding of the vocabulary included and a tied head once."""
    C, L = config.n_embd, config.n_layer  # noqa: N806
    matrices = 3 * C * C + C * C + 4 * C * C + 4 * C * C  # attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
    biases = 3 * C + C + 4 * C + C
    norm = 2 * C if config.bias else C
    block = matrices + (biases if config.bias else 0) + 2 * norm
    head = 0 if config.tie_weights else config.padded_vocab_size * C
    return config.padded_vocab_size * C + config.block_size * C + L * block + norm + head


def flops_per_token(config: GPTConfig) -> int:
    """Floating-point operations of one training token, forward and backward.

    6 N + 12 L nh hs T, with N the parameters that are multiplied (no position embedding; an untied token embedding is
    a look-up). Source: Chowdhery et al. 2022 (PaLM), appendix B. Recomputed activations do not count.
    """
    looked_up = config.block_size * config.n_embd
    if not config.tie_weights:
        looked_up += config.padded_vocab_size * config.n_embd
    multiplied = parameter_count(config) - looked_up
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * config.block_size
