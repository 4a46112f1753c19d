"""Continue a text: one token at a time, drawn from the model's own distribution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT, idx: Tensor, *, max_new_tokens: int, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """Extend every row of ``idx`` by ``max_new_tokens`` tokens.

    Args:
        model: Its training mode is restored afterwards.
        idx: Prompts (B, T), T >= 1; what is longer than the block is seen only by its end.
        max_new_tokens: How many tokens each row gains.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw only from the k likeliest tokens (Fan et al. 2018, section 5.1); None draws from all.
        generator: On the device of ``idx``; the only source of randomness.

    Returns:
        Token ids (B, T + max_new_tokens).
    """
    training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[:, -1].float()  # (B, V)
        idx = torch.cat((idx, draw(logits, temperature, top_k, generator)), dim=1)
    model.train(training)
    return idx


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Draw one id (B, 1) for each row of ``logits`` (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1, generator=generator)
