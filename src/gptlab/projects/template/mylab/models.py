"""Models: subclasses of ``CausalLM``, or of ``GPT`` or ``ModernGPT``. Shapes: B batch, T time, V vocabulary."""

from gptlab.model.causal_lm import CausalLM
from gptlab.model.config import GPTConfig
from torch import Tensor, nn


class Bigram(CausalLM):
    """Bigram model, as a baseline: the logits depend only on the latest token.

    Args:
        config: Configuration of the model, from gptlab.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.logits = nn.Embedding(config.known_vocab_size, config.known_vocab_size)

    def forward(self, idx: Tensor, documents: Tensor | None = None) -> Tensor:
        """Returns the next-token logits (B, T, V) of token IDs ``idx`` (B, T)."""
        return self.logits(idx)
