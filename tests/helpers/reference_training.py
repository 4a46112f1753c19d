"""A plain training loop, the reference for the train command."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from gptlab.data.order import WindowOrder
from gptlab.model.config import GPTConfig
from gptlab.model.gpt import GPT


def plain_training(
    user,
    directory: Path,
    steps: int,
    before: Callable[[int, GPT, torch.optim.AdamW], None] = lambda *_: None,
    **changes,
) -> tuple[list[float], GPT]:
    """Trains as the train command does, in a plain loop that starts from the text file.

    Args:
        user: User with the text.
        directory: Run directory whose model configuration is used.
        steps: Number of steps.
        before: Called before every step with the step (from 0), the model and the optimizer.
        changes: Changes of the model configuration.

    Returns:
        The loss of every step, and the trained model.
    """
    text = (user.folder / "text.txt").read_text()
    cut = int(len(text) * 0.9)
    tokens, val = [*text[:cut].encode()], [*text[cut:].encode(), 256]
    shards = {"train": [_sha(tokens)], "val": [_sha(val)]}
    fingerprint = hashlib.sha256(json.dumps([{"name": "bytes"}, shards], sort_keys=True).encode()).hexdigest()
    order = WindowOrder([len(tokens)], 32, 1337, fingerprint, "shuffled", 1, None)
    torch.manual_seed(1337)
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    model = GPT(GPTConfig(**settings["model"] | changes))
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (step + 1) / 101  # learning rate of model=tiny, with a warm-up over 100 steps
        if before:
            before(step, model, optimizer)
        starts = order.starts(np.arange(step * 12, step * 12 + 12))
        windows = torch.tensor([tokens[start : start + 33] for start in starts])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def _sha(tokens: list[int]) -> str:
    return hashlib.sha256(np.array(tokens, dtype="<u2").tobytes()).hexdigest()
