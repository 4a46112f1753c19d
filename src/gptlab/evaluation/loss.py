"""Loss and bits per byte over text that was not trained on."""

import math

import torch
from torch import Tensor

from gptlab.data.batches import IGNORE_INDEX


class LossSums:
    """Sums over scored tokens, which add up over batches and devices in any order.

    Loss depends on the tokenizer; bits per byte does not, which is what makes two models with different vocabularies
    comparable: the nats of all tokens that stand for text, over ln 2 times the bytes of that text. Special tokens stand
    for none and are left out (Gao et al. 2020, The Pile, section 3.1).

    Args:
        token_bytes: Bytes of text that each id stands for (V,); 0 for special tokens.
    """

    def __init__(self, token_bytes: Tensor) -> None:
        self.token_bytes = token_bytes
        # nats, tokens; nats and bytes of the tokens that stand for text
        self.sums = torch.zeros(4, dtype=torch.float64, device=token_bytes.device)

    def add(self, nats: Tensor, targets: Tensor) -> None:
        """Add the tokens of one batch: the losses (B, T) of ``targets`` (B, T), which are -100 where not scored."""
        nats, targets = nats.flatten().double(), targets.flatten()
        scored = targets != IGNORE_INDEX
        lengths = torch.where(scored, self.token_bytes[targets.clamp(min=0)].long(), 0)
        text_nats = torch.where(lengths > 0, nats, 0)
        self.sums += torch.stack((nats.sum(), scored.sum(), text_nats.sum(), lengths.sum()))

    def result(self) -> tuple[float, float]:
        """Return the loss (nats per token) and bits per byte of everything added; nan where there is nothing."""
        nats, tokens, text_nats, text_bytes = self.sums.tolist()
        return (
            nats / tokens if tokens else math.nan,
            text_nats / (math.log(2) * text_bytes) if text_bytes else math.nan,
        )
