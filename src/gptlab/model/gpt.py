"""The GPT-2 decoder (Radford et al. 2019) in its own names.

Shapes: B batch, T time, C channels (``n_embd``), nh heads, hs head size, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptlab.model.config import GPTConfig
from gptlab.model.documents import Mask, attend, document_mask, positions_within

LAYER_NORM_EPSILON = 1e-5  # GPT-2's layer_norm_epsilon
INIT_STD = 0.02  # Radford et al. 2018, section 4.1


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_size = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """Mix the positions of ``x`` (B, T, C), causally and within the mask; same shape."""
        B, T, _ = x.shape  # noqa: N806
        q, k, v = (
            part.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nh, T, hs)
            for part in self.c_attn(x).chunk(3, dim=2)
        )
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """The position-wise network: four times wider in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of ``x`` (B, T, C) by itself; same shape."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """One pre-LN residual block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = _layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = _layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """Add what attention and then the MLP have to say to ``x`` (B, T, C); same shape."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The decoder stack: embeddings, blocks, final LayerNorm and head.

    Raises:
        ValueError: ``config.vocab_size`` is None.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = _layer_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self._initialise()

    def forward(self, idx: Tensor, documents: Tensor | None = None) -> Tensor:
        """Score the next token at every position.

        Args:
            idx: Token ids (B, T), T at most ``block_size``.
            documents: Number (B, T) of the document that each token belongs to: attention stays within it, and
                positions count from its beginning. None: the sequence is one.

        Returns:
            Logits (B, T, V) over the real vocabulary: the padding of the embedding is cut off here, so it can be
            neither learnt nor sampled.

        Raises:
            ValueError: T is longer than the block.
        """
        T = idx.size(1)  # noqa: N806
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens does not fit the block of {self.config.block_size}")
        if documents is None:
            mask, positions = None, torch.arange(T, device=idx.device)
        else:  # FlexAttention has no dropout
            flex = idx.is_cuda and not (self.training and self.config.dropout)
            mask, positions = document_mask(documents, flex=flex), positions_within(documents)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        for block in self.h:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return self.lm_head(self.ln_f(x))[..., : self.config.known_vocab_size]

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions from ``block_size`` on; ValueError where there are not that many."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"cannot crop a block of {self.config.block_size} to {block_size}")
        self.config = self.config.model_copy(update={"block_size": block_size})
        self.wpe.weight = nn.Parameter(self.wpe.weight.detach()[:block_size].clone())
        self.wpe.num_embeddings = block_size

    def _initialise(self) -> None:
        """Draw N(0, 0.02), residual projections smaller by sqrt(2 L) (Radford et al. 2019, section 2.3); biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, 0.0, INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def _layer_norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON, bias=config.bias)
