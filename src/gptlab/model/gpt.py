"""The GPT-2 decoder (Radford et al. 2019) in its own names, and what has been found since, each an option.

Shapes: B batch, T time, C channels (``n_embd``), nh heads, hs head size, V vocabulary.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from gptlab.model.attention import CausalSelfAttention, Mix, Sight, sight
from gptlab.model.config import NORM_EPSILON, GPTConfig
from gptlab.model.generation.kv_cache import KVCache, LayerCache, Place
from gptlab.model.loss import Head, mean_loss, nats

INIT_STD = 0.02  # Radford et al. 2018, section 4.1


class ReLUSquared(nn.Module):
    """The square of what is positive (So et al. 2021, Primer, section 4.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every element; same shape."""
        return F.relu(x).square()


class MLP(nn.Module):
    """The position-wise network: four times wider in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = _activation(config)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of ``x`` (B, T, C) by itself; same shape."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """One pre-LN residual block."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.mix_skip = Mix(1.0) if config.has_skip(layer) else None
        self.mix_x0 = Mix(1.0, 0.0) if config.x0_skips else None
        self.ln_1 = _norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        skip: Tensor | None,
        others: tuple[Tensor, ...],
        seen: Sight,
        cache: LayerCache | None,
        place: Place | None,
    ) -> tuple[Tensor, Tensor]:
        """Add what attention and then the MLP have to say.

        Args:
            x: What the block before returned (B, T, C).
            x0: The embedding (B, T, C), for ``x0_skips``.
            skip: What this block's mirror image among the first returned (B, T, C), for ``unet_skips``.
            others: Values (B, T, C) to be mixed into this block's own.
            seen: What the tokens see.
            cache: See ``CausalSelfAttention.forward``.
            place: See there.

        Returns:
            The output, and the block's own values; both (B, T, C).
        """
        if self.mix_skip is not None and skip is not None:
            x = x + self.mix_skip(skip)
        if self.mix_x0 is not None:
            x = self.mix_x0(x, x0)
        y, values = self.attn(self.ln_1(x), seen, others, cache, place)
        x = x + y
        return x + self.mlp(self.ln_2(x)), values


class GPT(nn.Module):
    """The decoder stack: embeddings, blocks, final LayerNorm and head.

    Raises:
        ValueError: ``config.vocab_size`` is None.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.head = config, Head(config.known_vocab_size, config.logit_soft_cap)
        rows = config.padded_vocab_size
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.ln_e = _norm(config) if config.embedding_norm else None
        self.value_embeds = nn.ModuleList(nn.Embedding(rows, config.n_embd) for _ in range(config.value_embeddings))
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = _norm(config)
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.tie_weights()
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
        return self.head.capped(self.lm_head(self._states(idx, documents))[..., : self.head.vocab_size])

    def loss(self, idx: Tensor, targets: Tensor, documents: Tensor | None, chunk: int | None) -> Tensor:
        """Mean loss () in nats per scored token, for training.

        Args:
            idx: As in ``forward``.
            targets: The ids that follow (B, T), -100 where not scored.
            documents: As in ``forward``.
            chunk: Tokens whose logits are there at a time; None has them all at once.
        """
        return mean_loss(
            self._states(idx, documents).flatten(0, 1), self._matrix(), targets.flatten(), self.head, chunk
        )

    def nats(self, idx: Tensor, targets: Tensor, documents: Tensor | None, chunk: int | None) -> Tensor:
        """Loss of every token (B, T), 0 where it is not scored, for evaluation; the arguments are those of ``loss``."""
        x = self._states(idx, documents).flatten(0, 1)
        return nats(x, self._matrix(), targets.flatten(), self.head, chunk).view_as(targets)

    def logits_at(self, idx: Tensor, places: Tensor) -> Tensor:
        """Score the next token where ``places`` (B, T) is true, row after row: logits (N, V)."""
        return self.head.logits(self._states(idx, None)[places], self._matrix())

    def next_logits(self, idx: Tensor, cache: KVCache, place: Place) -> Tensor:
        """Score what follows the last of some tokens, whose predecessors the cache has.

        Args:
            idx: Token ids (B, T).
            cache: Gets their keys and values.
            place: Where these go; slots beyond ``block_size`` are no positions that were learnt.

        Returns:
            Logits (B, V).
        """
        everything = place.mask(None)
        window = place.mask(self.config.attention_window) if self.config.attention_window else everything
        x = self._through_blocks(idx, Sight(place.positions, everything, window), cache, place)
        return self.head.capped(self.lm_head(x[:, -1])[..., : self.head.vocab_size])

    def _states(self, idx: Tensor, documents: Tensor | None) -> Tensor:
        """What the head sees of every position (B, T, C)."""
        T = idx.size(1)  # noqa: N806
        if self.config.block_size < T:
            raise ValueError(f"a sequence of {T} tokens does not fit the block of {self.config.block_size}")
        flex = idx.is_cuda and not (self.training and self.config.dropout)  # FlexAttention has no dropout
        return self._through_blocks(idx, sight(self.config, idx, documents, flex=flex), None, None)

    def _through_blocks(self, idx: Tensor, seen: Sight, cache: KVCache | None, place: Place | None) -> Tensor:
        config, embeds = self.config, [embed(idx) for embed in self.value_embeds]
        x = self.wte(idx) if self.wpe is None else self.wte(idx) + self.wpe(seen.positions)
        x = x0 = self.drop(x if self.ln_e is None else self.ln_e(x))  # (B, T, C)
        first: tuple[Tensor, ...] = ()  # the first block's values
        outputs: list[Tensor] = []  # of the first half of the blocks
        for layer, block in enumerate(self.h):
            number = config.value_embedding(layer)
            others = first if number is None else (*first, embeds[number])
            skip = outputs.pop() if config.has_skip(layer) else None
            part = cache.layers[layer] if cache is not None else None
            arguments = (x, x0, skip, others, seen, part, place)
            if config.activation_checkpointing and self.training:
                x, values = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, values = block(*arguments)
            if config.value_residual and layer == 0:
                first = (values,)
            if config.unet_skips and layer < config.n_layer // 2:
                outputs.append(x)
        return self.ln_f(x)

    def _matrix(self) -> Tensor:
        """The head's (R, C), where devices share the network the whole of it on each."""
        weight = self.lm_head.weight
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights by their names as they are, and not a copy of them."""
        self.load_state_dict(weights, assign=True)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head have the embedding's matrix, where they share one."""
        if self.config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def crop_block_size(self, block_size: int) -> None:
        """Forget the positions from ``block_size`` on; ValueError where there are not that many."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"cannot crop a block of {self.config.block_size} to {block_size}")
        self.config = self.config.model_copy(update={"block_size": block_size})
        if self.wpe is not None:
            self.wpe.weight = nn.Parameter(self.wpe.weight.detach()[:block_size].clone())
            self.wpe.num_embeddings = block_size

    def _initialise(self) -> None:
        """Draw N(0, 0.02), residual projections smaller by sqrt(2 L) (Radford et al. 2019, section 2.3); biases 0.

        With ``zero_init`` these projections, and a head of its own, begin at 0.
        """
        config = self.config
        for name, parameter in self.named_parameters():
            residual = name.endswith("c_proj.weight")
            if config.zero_init and (residual or name == "lm_head.weight"):
                nn.init.zeros_(parameter)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, 0.0, INIT_STD / math.sqrt(2 * config.n_layer) if residual else INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def hollow(config: GPTConfig) -> GPT:
    """Build a network whose weights take no memory and have no values, for ``GPT.fill``."""
    with torch.device("meta"):
        return GPT(config)


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=NORM_EPSILON)
    return nn.LayerNorm(config.n_embd, eps=NORM_EPSILON, bias=config.bias)


def _activation(config: GPTConfig) -> nn.Module:
    if config.activation == "relu_squared":
        return ReLUSquared()
    return nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
