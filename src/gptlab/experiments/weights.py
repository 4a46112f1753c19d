"""Weights out of run directories. Nothing is unpickled but plain tensors and numbers."""

from pathlib import Path
from typing import Any

import torch

from gptlab.errors import UserError
from gptlab.experiments.directory import find_checkpoint, load_config
from gptlab.model.gpt import GPT
from gptlab.training.config import BEST, LAST


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's plain data; UserError where it is damaged or holds anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of gptlab: it has no state_dict and global_step.")
    return checkpoint


def load_weights(model: GPT, directory: Path) -> None:
    """Load the best weights of a run (else its last) into ``model``, which they fit (``directory.check_fit``)."""
    state = read_checkpoint(find_checkpoint(directory, BEST, LAST))["state_dict"]
    state["wpe.weight"] = state["wpe.weight"][: model.config.block_size]
    model.load_state_dict(state)


def load_model(directory: Path) -> GPT:
    """Build the model of a run with its best weights, on the CPU, for evaluation."""
    model = GPT(load_config(directory).model)
    load_weights(model, directory)
    return model.eval()
