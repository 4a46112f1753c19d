"""Weights out of run directories. Nothing is unpickled but plain tensors and numbers."""

from pathlib import Path
from typing import Any

import torch

from gptlab.errors import UserError
from gptlab.experiments.directory import find_checkpoint, load_config
from gptlab.model.gpt import GPT
from gptlab.training.callbacks.checkpoints import BEST, LAST

# What decides which parameters there are, and their shapes.
SHAPING = (
    "block_size",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
    "bias",
    "tie_weights",
    "pad_vocab_to_multiple_of",
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's plain data; UserError where it is damaged or holds anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error


def load_weights(model: GPT, directory: Path) -> None:
    """Load the best weights of a run (else its last) into ``model``; UserError where they do not fit."""
    there, here = load_config(directory).model, model.config
    if differences := [
        f"model.{key} is {getattr(there, key)} there and {getattr(here, key)} here"
        for key in SHAPING
        if getattr(there, key) != getattr(here, key)
    ]:
        raise UserError(f"The weights of {directory} do not fit this model: {'; '.join(differences)}.")
    model.load_state_dict(read_checkpoint(find_checkpoint(directory, BEST, LAST))["state_dict"])


def load_model(directory: Path) -> GPT:
    """Build the model of a run with its best weights, on the CPU, for evaluation."""
    model = GPT(load_config(directory).model)
    load_weights(model, directory)
    return model.eval()
