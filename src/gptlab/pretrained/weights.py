"""Loads the weights of runs and of other programs. Unpickles only tensors and plain data."""

from pathlib import Path

from torch import Tensor

from gptlab.errors import UserError
from gptlab.model.external import fit_shapes, from_external
from gptlab.model.gpt import GPT
from gptlab.model.lora import merge_lora
from gptlab.model.modern import meta_gpt
from gptlab.pretrained.external import check_external_shape, is_external, nanogpt_shape, open_safetensors, weight_files
from gptlab.pretrained.nanogpt import read_nanogpt_checkpoint
from gptlab.pretrained.source import ModelSource
from gptlab.tracking.run_directory import best_checkpoint, load_config
from gptlab.training.checkpoints.reading import read_weights


def load_weights(model: GPT, path: Path) -> None:
    """Loads weights into ``model``.

    Args:
        model: The model.
        path: Run directory, whose best checkpoint is loaded (its averaged weights, if there are any), or a model of
            another program.

    Raises:
        UserError: The weights cannot be read or do not fit the model.
    """
    model.load_state_dict(_read_weights(model, path))


def load_model(source: ModelSource) -> GPT:
    """Builds a trained model on the CPU, in float32 and evaluation mode.

    float32 weights are memory-mapped from the file.

    Raises:
        UserError: The weights cannot be read or do not fit the model.
    """
    model = meta_gpt(source.model)
    weights = {name: tensor.float().contiguous() for name, tensor in _read_weights(model, source.path).items()}
    model.load_weights(weights)
    return model.requires_grad_(True).eval()


def _read_weights(model: GPT, path: Path) -> dict[str, Tensor]:
    """Returns the state dict of ``model``."""
    if is_external(path):
        return _read_external(model, path)
    state = read_weights(best_checkpoint(path))
    if (lora := load_config(path).lora) is not None:
        state = merge_lora(state, lora)
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][: model.config.block_size]
    if model.config.tie_weights:
        state["lm_head.weight"] = state["wte.weight"]
    return state


def _read_external(model: GPT, path: Path) -> dict[str, Tensor]:
    """Returns the state dict of ``model`` from the weights of another program."""
    state: dict[str, Tensor] = {}
    if path.is_file():
        checkpoint = read_nanogpt_checkpoint(path)
        check_external_shape(path, nanogpt_shape(path, checkpoint.get("model_args")), model.config)
        state = checkpoint["model"]
    else:
        for file in weight_files(path):
            with open_safetensors(file, "pt") as tensors:
                state.update((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118  (no mapping)
    try:
        return fit_shapes(model, from_external(state, transposed=path.is_dir()))
    except ValueError as error:
        raise UserError(f"The weights of {path} do not fit this model: {error}.") from error
