"""Loads the weights of runs and of other programs. Unpickles only tensors and plain data."""

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from gptlab.errors import UserError, mismatch_reason
from gptlab.model.external import fit_shapes, from_external, resize_embeddings
from gptlab.model.gpt import GPT
from gptlab.model.lora import merge_lora
from gptlab.model.modern import meta_gpt
from gptlab.pretrained.external import (
    check_external_shape,
    fits_vocabulary,
    is_external,
    nanogpt_shape,
    open_safetensors,
    read_hf_shape,
    weight_files,
)
from gptlab.pretrained.nanogpt import read_nanogpt_checkpoint
from gptlab.pretrained.source import ModelSource
from gptlab.tracking.run_directory import load_config, split_checkpoint, weights_checkpoint
from gptlab.training.checkpoints.reading import read_weights

log = logging.getLogger(__name__)


def load_weights(model: GPT, path: Path) -> None:
    """Loads weights into ``model``.

    Args:
        model: The model.
        path: Run directory, whose best checkpoint is loaded, one of its checkpoints, or a model of another program. Of
            a checkpoint, the averaged weights are loaded if there are any.

    Raises:
        UserError: The weights cannot be read or do not fit the model.
    """
    _load(model, _read_weights(model, path), path)


def load_model(source: ModelSource) -> GPT:
    """Builds a trained model on the CPU, in float32 and evaluation mode.

    float32 weights are memory-mapped from the file.

    Raises:
        UserError: The weights cannot be read or do not fit the model.
    """
    model = meta_gpt(source.model)
    read = _read_weights(model, source.checkpoint or source.path)
    weights = {name: tensor.float().contiguous() for name, tensor in read.items()}
    _load(model, weights, source.path)
    return model.requires_grad_(True).eval()


def _read_weights(model: GPT, path: Path) -> dict[str, Tensor]:
    """Returns the state dict of ``model``."""
    if is_external(path):
        return _read_external(model, path)
    state = read_weights(weights_checkpoint(path))
    try:
        trained = load_config(split_checkpoint(path)[0])
        if trained.lora is not None:
            state = merge_lora(state, trained.lora)
        if model.config.resize_embeddings and not next(model.parameters()).is_meta:
            state = _resize(model, state, trained.model.known_vocab_size, path)
        if "wpe.weight" in state:
            state["wpe.weight"] = state["wpe.weight"][: model.config.block_size]
        for name, tied in _tied_names(model):
            state[name] = state[tied]
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"The weights of {path} do not fit this model: {mismatch_reason(error)}") from error
    return state


def _resize(model: GPT, weights: dict[str, Tensor], old: int, path: Path) -> dict[str, Tensor]:
    """Resizes the embeddings of weights with ``old`` token IDs to those of ``model``, and logs it."""
    new = model.config.known_vocab_size
    if new > old:
        added = f"the {new - old:,} new rows are the mean of the others"
        log.info("Resized the embedding of %s from %s to %s token IDs: %s.", path, f"{old:,}", f"{new:,}", added)
    elif new < old:
        log.info("Resized the embedding of %s from %s to %s token IDs.", path, f"{old:,}", f"{new:,}")
    return resize_embeddings(weights, old, model)


def _load(model: GPT, weights: dict[str, Tensor], path: Path) -> None:
    """Loads weights; raises UserError if a model with components does not have parameters of these names and shapes."""
    try:
        if next(model.parameters()).is_meta:
            model.load_weights(weights)
        else:
            model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"The weights of {path} do not fit this model: {error}") from error


def _tied_names(model: GPT) -> Iterator[tuple[str, str]]:
    """Yields each further name of a shared parameter, and its first name."""
    first: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(parameter, name)) != name:
            yield name, known


def _read_external(model: GPT, path: Path) -> dict[str, Tensor]:
    """Returns the state dict of ``model`` from the weights of another program."""
    state: dict[str, Tensor] = {}
    if path.is_file():
        checkpoint = read_nanogpt_checkpoint(path)
        shape = nanogpt_shape(path, checkpoint.get("model_args"))
        check_external_shape(path, shape, model.config)
        state = checkpoint["model"]
    else:
        shape = read_hf_shape(path)
        for file in weight_files(path):
            with open_safetensors(file, "pt") as tensors:
                state.update((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118  (no mapping)
    try:
        weights = from_external(state, transposed=path.is_dir())
        resized = model.config.resize_embeddings and not fits_vocabulary(
            shape["vocab_size"], model.config.known_vocab_size
        )
        for name, size in (("wte.weight", "vocab_size"), ("wpe.weight", "block_size")):
            rows = weights[name].shape[0] if name in weights and weights[name].dim() else 0
            if rows > shape[size]:  # fit_shapes reports too few, but would crop too many
                raise ValueError(f"{name} has {rows} rows, but the model has {size}={shape[size]}")
        return fit_shapes(model, _resize(model, weights, shape["vocab_size"], path) if resized else weights)
    except ValueError as error:
        raise UserError(f"The weights of {path} do not fit this model: {error}.") from error
