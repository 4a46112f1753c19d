"""The GPT-2 decoder (Radford et al. 2019), with GPT-2's module names. Later variants are in ``gptlab.model.modern``.

Shapes: B batch, T time, C channels (``n_embd``), V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from gptlab.model.attention import (
    AttentionContext,
    CausalSelfAttention,
    build_attention_context,
    build_cached_context,
)
from gptlab.model.causal_lm import CausalLM, LossFunction
from gptlab.model.config import NORM_EPSILON, GPTConfig
from gptlab.model.generation.kv_cache import CachePosition, KVCache
from gptlab.model.loss import LogitSettings, custom_loss, lm_loss, token_losses

INIT_STD = 0.02  # Radford et al. 2018, section 4.1
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh")}


class MLP(nn.Module):
    """Position-wise feed-forward network with hidden width 4 C."""

    def __init__(self, config: GPTConfig, activation: nn.Module) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = activation
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms each position of ``x`` (B, T, C) independently; same shape."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Pre-LN residual block: attention, then MLP."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=NORM_EPSILON, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=NORM_EPSILON, bias=config.bias)
        self.mlp = MLP(config, ACTIVATIONS[str(config.activation)]())

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Transforms the residual stream ``x`` (B, T, C); same shape."""
        x = x + self.attn(self.ln_1(x), ctx)
        x = x + self.mlp(self.ln_2(x))
        return x  # noqa: RET504


class GPT(CausalLM):
    """GPT-2: embeddings, blocks, final LayerNorm and head.

    ``gptlab.model.modern.build_gpt`` builds the model of any configuration.

    Raises:
        ValueError: ``config.vocab_size`` is None, or ``config`` has an option that GPT-2 does not have.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        if not config.has_gpt2_options:
            raise ValueError("GPT implements only the options of GPT-2; use build_gpt for other options")
        self.logit_settings = LogitSettings(config.known_vocab_size, config.logit_soft_cap)
        self.wte = nn.Embedding(config.known_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f: nn.Module = nn.LayerNorm(config.n_embd, eps=NORM_EPSILON, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.known_vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()
        self.pad_vocab(self.wte)

    def forward(self, idx: Tensor, documents: Tensor | None = None) -> Tensor:
        """Computes the next-token logits at every position.

        Args:
            idx: Token IDs (B, T); T is at most ``block_size``.
            documents: Document index (B, T) of every token. Attention stays within a document, and positions start at 0
                in each. None if each sequence is one document.

        Returns:
            Logits (B, T, V) over the vocabulary, without the padding of the embedding, which is therefore neither
            learned nor sampled.

        Raises:
            ValueError: T is greater than ``block_size``.
        """
        return self._logits(self.hidden_states(idx, self.attention_context(idx, documents)))

    def hidden_states(self, idx: Tensor, ctx: AttentionContext) -> Tensor:
        """Returns the final hidden states (B, T, C), which are the input of the head."""
        x = self.drop(self.wte(idx) + self.wpe(ctx.positions))
        for block in self.h:
            x = self.run_block(block, x, ctx)
        return self.ln_f(x)

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Calls a block. With activation checkpointing, its activations are recomputed in the backward pass."""
        if self.config.activation_checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def attention_context(self, idx: Tensor, documents: Tensor | None) -> AttentionContext:
        """Builds the attention context of full sequences; arguments and errors as in ``forward``."""
        if (length := idx.size(1)) > self.config.block_size:
            raise ValueError(f"a sequence of {length} tokens is longer than block_size={self.config.block_size}")
        flex = idx.is_cuda and not (self.training and self.config.dropout)  # FlexAttention does not support dropout
        return build_attention_context(self.config, idx, documents, self.wte.weight.dtype, flex=flex)

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        documents: Tensor | None,
        chunk: int | None,
        function: LossFunction | None = None,
    ) -> Tensor:
        """Returns the loss () of a micro-batch, for training: the mean in nats per scored token.

        Args:
            idx: As in ``forward``.
            targets: IDs of the next tokens (B, T), -100 where not scored.
            documents: As in ``forward``.
            chunk: Number of tokens whose logits are in memory at a time; None for all tokens.
            function: Loss function to use instead: f(logits (N, V), targets (N,)) or, if its first parameter is named
                ``states``, f(states (N, C), weight (R, C), targets (N,)) of the hidden states and the head's weight.
                It is called once, with all tokens of the micro-batch.

        Raises:
            ValueError: T is greater than ``block_size``.
        """
        x = self.hidden_states(idx, self.attention_context(idx, documents)).flatten(0, 1)
        if function is not None:
            return custom_loss(function, x, self._head_weight(), targets.flatten(), self.logit_settings)
        return lm_loss(x, self._head_weight(), targets.flatten(), self.logit_settings, chunk)

    def token_losses(self, idx: Tensor, targets: Tensor, documents: Tensor | None, chunk: int | None) -> Tensor:
        """Returns the loss in nats of every token (B, T), 0 where not scored; arguments and errors as in ``loss``."""
        x = self.hidden_states(idx, self.attention_context(idx, documents)).flatten(0, 1)
        return token_losses(x, self._head_weight(), targets.flatten(), self.logit_settings, chunk).view_as(targets)

    def logits_at(self, idx: Tensor, selected: Tensor) -> Tensor:
        """Returns the next-token logits (N, V) of the N positions where ``selected`` (B, T) is true, in row order.

        Raises:
            ValueError: T is greater than ``block_size``.
        """
        x = self.hidden_states(idx, self.attention_context(idx, None))
        return self.logit_settings.logits(x[selected], self._head_weight())

    def next_logits(self, idx: Tensor, cache: KVCache, position: CachePosition) -> Tensor:
        """Computes the next-token logits after the last of some new tokens; the earlier tokens are in the cache.

        Args:
            idx: IDs of the new tokens (B, T).
            cache: KV cache, to which the keys and values of the new tokens are added.
            position: Slots of the new tokens; learned positions allow only slots below ``block_size``.

        Returns:
            Logits (B, V).
        """
        ctx = build_cached_context(self.config, cache, position, self.wte.weight.dtype)
        return self._logits(self.hidden_states(idx, ctx)[:, -1])

    def _logits(self, x: Tensor) -> Tensor:
        return self.logit_settings.cap(self.lm_head(x)[..., : self.logit_settings.vocab_size])

    def _head_weight(self) -> Tensor:
        """Returns the head's weight (R, C); under tensor parallelism, the full weight on each device."""
        weight = self.lm_head.weight
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def tie_weights(self) -> None:
        """Shares the weight of the embedding with the head, if ``config.tie_weights``."""
        if self.config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def crop_block_size(self, block_size: int) -> None:
        """Reduces the block size, and truncates the positional embedding if there is one.

        Raises:
            ValueError: ``block_size`` is not between 1 and the current block size.
        """
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"cannot crop block_size={self.config.block_size} to {block_size}")
        self.config = self.config.model_copy(update={"block_size": block_size})
        if self.wpe is not None:
            self.wpe.weight = nn.Parameter(self.wpe.weight.detach()[:block_size].clone())
            self.wpe.num_embeddings = block_size

    def init_weights(self) -> None:
        """Initializes all parameters, in the order of ``named_parameters``."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    def pad_vocab(self, *embeddings: nn.Embedding) -> None:
        """Adds rows of zeros to the embeddings and the head, up to ``config.padded_vocab_size``.

        The other weights are drawn before, so that they do not depend on the padding.
        """
        added = self.config.padded_vocab_size - self.config.known_vocab_size
        if not added:
            return
        parts: list[nn.Embedding | nn.Linear] = [*embeddings, self.lm_head]
        for part in parts:
            part.weight = nn.Parameter(F.pad(part.weight.detach(), (0, 0, 0, added)))
        for embedding in embeddings:
            embedding.num_embeddings += added
        self.lm_head.out_features += added
        self.tie_weights()

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """Initializes a parameter from a normal distribution with standard deviation 0.02; biases are 0.

        The standard deviation of residual projections is 0.02 / sqrt(2 L) (Radford et al. 2019, section 2.3).
        """
        if parameter.dim() >= 2:
            is_residual = name.endswith("c_proj.weight")
            nn.init.normal_(parameter, 0.0, INIT_STD / math.sqrt(2 * self.config.n_layer) if is_residual else INIT_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
