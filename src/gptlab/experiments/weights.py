"""Weights out of run directories, and those of others. Nothing is unpickled but plain tensors and numbers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import UserError
from gptlab.experiments.directory import best_checkpoint, load_config
from gptlab.experiments.foreign import check_foreign_shape, is_foreign, nanogpt_shape, opened, weight_files
from gptlab.model.foreign import load_renamed, renamed
from gptlab.model.gpt import GPT
from gptlab.training.checkpoints.reading import averages, read, read_plain


def load_weights(model: GPT, directory: Path) -> None:
    """Load weights into ``model``, which they fit: the best of a run, their average if it kept one, or those of others.

    Raises:
        UserError: They cannot be read, or do not fit after all.
    """
    if is_foreign(directory):
        _load_foreign(model, directory)
        return
    checkpoint = read(best_checkpoint(directory))
    for state in (checkpoint["state_dict"], average := averages(checkpoint)):
        if "wpe.weight" in state:
            state["wpe.weight"] = state["wpe.weight"][: model.config.block_size]
    model.load_state_dict(checkpoint["state_dict"])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in average.items():
            parameters[name].copy_(tensor)


def _load_foreign(model: GPT, path: Path) -> None:
    """Load what ``gptlab.experiments.foreign`` describes."""
    state: dict[str, Tensor] = {}
    if path.is_file():
        checkpoint = read_plain(path)
        if not isinstance(checkpoint, dict) or not _are_tensors(state := checkpoint.get("model", {})):
            raise UserError(
                f"{path} is not a checkpoint of nanoGPT: it has no model of named tensors. A run of gptlab is named by "
                "its directory."
            )
        check_foreign_shape(path, nanogpt_shape(path, checkpoint.get("model_args")), model.config)
    else:
        for file in weight_files(path):
            with opened(file, "pt") as tensors:
                state.update((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118  (no mapping)
    try:
        load_renamed(model, renamed(state, transposed=path.is_dir()))
    except ValueError as error:
        raise UserError(f"The weights of {path} do not fit this model: {error}.") from error


def _are_tensors(state: Any) -> bool:
    tensors = state.items() if isinstance(state, dict) else ()
    return bool(tensors) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors)


def load_model(directory: Path) -> GPT:
    """Build the model of a run with its best weights, on the CPU, for evaluation."""
    model = GPT(load_config(directory).model)
    load_weights(model, directory)
    return model.eval()
