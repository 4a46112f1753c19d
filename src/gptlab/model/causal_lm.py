"""Base class of the models that gptlab trains.

Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.model.config import GPTConfig
from gptlab.model.generation.kv_cache import CachePosition, KVCache
from gptlab.model.loss import IGNORED

LossFunction = Callable[..., Tensor]  # f(logits (N, V), targets (N,)) or f(states (N, C), weight (R, C), targets (N,))


class CausalLM(nn.Module):
    """Base class of causal language models. A subclass implements ``forward``, and can be ``model._target_``.

    ``named_parameters`` gives the names in checkpoints. If the blocks are ``self.h``, an ``nn.ModuleList``, FSDP shards
    and torch.compile can compile them one by one.

    Args:
        config: Model configuration. The model must accept ``block_size`` tokens and return ``known_vocab_size`` logits.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, idx: Tensor, documents: Tensor | None = None) -> Tensor:
        """Computes the next-token logits at every position.

        Args:
            idx: Token IDs (B, T); T is at most ``config.block_size``.
            documents: Document index (B, T) of every token, with ``data.documents=masked``; otherwise None.

        Returns:
            Logits (B, T, V).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(idx, documents)")

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        documents: Tensor | None,
        chunk: int | None,
        function: LossFunction | None = None,
    ) -> Tensor:
        """Returns the mean loss () in nats per scored token, for training; see ``GPT.loss``."""
        logits = self(idx, documents).flatten(0, 1).float()
        if function is not None:
            return function(logits, targets.flatten())
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)

    def token_losses(self, idx: Tensor, targets: Tensor, documents: Tensor | None, chunk: int | None) -> Tensor:
        """Returns the loss in nats of every token (B, T), 0 where not scored; arguments as in ``loss``."""
        logits = self(idx, documents).flatten(0, 1).float()
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(targets)

    def logits_at(self, idx: Tensor, selected: Tensor) -> Tensor:
        """Returns the next-token logits (N, V) of the N positions where ``selected`` (B, T) is true, in row order."""
        return self(idx)[selected]

    def next_logits(self, idx: Tensor, cache: KVCache, position: CachePosition) -> Tensor:
        """Returns the next-token logits (B, V) after the last of some new tokens (B, T).

        A model that does not fill the cache is called without it: the whole context is recomputed for every token.
        """
        return self(idx)[:, -1]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks ``h``, if the model has any."""
        return list(getattr(self, "h", ()))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces the parameters with the given tensors, without copying them.

        Args:
            weights: Tensor for each name in ``state_dict``.

        Raises:
            RuntimeError: A name is missing or unknown, or a shape differs.
        """
        self.load_state_dict(weights, assign=True)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes parameters that share their values one tensor again, after ``load_weights``; none by default."""
