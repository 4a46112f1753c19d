"""Reads checkpoints. Only tensors and plain data are unpickled.

A checkpoint has ``global_step``, ``callbacks``, ``state_dict`` with GPT-2's parameter names, and ``optimizer_states``,
with the optimizer state of each parameter by its name. state.pt holds all of it. In a sharded checkpoint, safetensors
files hold the tensors of the last two, and state.pt the rest.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from gptlab.errors import UserError, failure_reason, mismatch_reason
from gptlab.files import open_regular
from gptlab.training.checkpoints.archive import check_archive
from gptlab.training.checkpoints.records import STATE
from gptlab.training.checkpoints.shards import is_sharded, read_tensors
from gptlab.training.optim.averaging import AVERAGE

Checkpoint = dict[str, Any]
_Count = Annotated[int, Field(strict=True, ge=0, le=2**40)]


class _OptimizerState(BaseModel):
    """Form of the state of an optimizer in state.pt; a sharded checkpoint has only the parameter groups."""

    state: dict[str, dict[str, Any]] = {}
    param_groups: list[dict[str, Any]]


class _State(BaseModel):
    """Form of state.pt."""

    global_step: _Count
    epoch: _Count = 0
    callbacks: dict[str, dict[str, Any]] = {}
    state_dict: dict[str, Any] = {}
    optimizer_states: list[_OptimizerState]


# Former class names of callbacks: Lightning saves a callback's state in state.pt under the name of its class.
RENAMED_CALLBACKS = {
    "Guard": "TrainingHealthMonitor",
    "Recorder": "MetricsCallback",
    "Checkpoints": "RunCheckpoint",
}


def read_checkpoint(checkpoint_dir: Path, wanted: Callable[[str], bool] = lambda key: True) -> Checkpoint:
    """Reads a checkpoint onto the CPU.

    Args:
        checkpoint_dir: Directory of the checkpoint.
        wanted: Selects the tensors of a sharded checkpoint by the names of ``flatten_tensors``; those of state.pt are
            memory-mapped and read when used.

    Raises:
        UserError: The checkpoint cannot be read, or holds anything but tensors and plain data.
    """
    checkpoint = read_state(checkpoint_dir)
    if is_sharded(checkpoint_dir):
        try:
            _unflatten_tensors(read_tensors(checkpoint_dir, wanted), checkpoint)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"The shards of {checkpoint_dir} do not match its {STATE}: {mismatch_reason(error)}."
            ) from error
    _check_tensors(checkpoint, checkpoint_dir)
    return checkpoint


def read_weights(checkpoint_dir: Path) -> dict[str, Tensor]:
    """Reads the parameters of a checkpoint, or their averages if saved.

    If ``wte.weight`` and ``lm_head.weight`` are tied, only ``wte.weight`` has an average.

    Raises:
        UserError: See ``read_checkpoint``.
    """
    checkpoint = read_checkpoint(checkpoint_dir, lambda key: key.startswith("model.") or key.endswith(f".{AVERAGE}"))
    states = [optimizer.get("state", {}) for optimizer in checkpoint["optimizer_states"]]
    averages = {name: moments[AVERAGE] for state in states for name, moments in state.items() if AVERAGE in moments}
    return {**checkpoint["state_dict"], **averages}


def read_state(checkpoint_dir: Path) -> Checkpoint:
    """Reads state.pt; raises UserError if it holds anything but tensors and plain data, which is not executed."""
    path = checkpoint_dir / STATE
    checkpoint = read_plain(path)
    if not isinstance(checkpoint, dict) or "global_step" not in checkpoint:
        raise UserError(f"{path} is not a gptlab checkpoint: it has no global_step.")
    try:
        state = _State.model_validate(checkpoint)
    except ValidationError as error:
        raise UserError(f"{path} is not a gptlab checkpoint: {failure_reason(error)}.") from None
    checkpoint["callbacks"] = {RENAMED_CALLBACKS.get(name, name): saved for name, saved in state.callbacks.items()}
    return checkpoint


def read_plain(path: Path) -> Any:
    """Reads plain data and tensors written by ``torch.save``; raises UserError if the file holds anything else."""
    try:
        with io.BufferedReader(open_regular(path, follow=True)) as file:
            check_archive(file)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # torch's message advises to load it with weights_only=False
        raise UserError(
            f"{path} was not loaded: it contains objects other than tensors and plain data, and unpickling these could "
            "run arbitrary code."
        ) from error
    except Exception as error:  # torch raises errors of many types for other files
        raise UserError(f"{path} cannot be read as a checkpoint: {failure_reason(error)}") from error


def _check_tensors(checkpoint: Checkpoint, checkpoint_dir: Path) -> None:
    """Checks that all weights and optimizer states are tensors whose elements are in memory.

    Kernels read and write as many elements as a tensor has, also if several of them are the same one in memory.

    Raises:
        UserError: The checkpoint lacks weights, or one is not a tensor or not a dense one; the message names it.
    """
    problem = None
    if "state_dict" not in checkpoint:
        problem = "it has no state_dict"
    for name, tensor in checkpoint.get("state_dict", {}).items():
        if not isinstance(tensor, Tensor) or not _is_dense(tensor):
            problem = f"{name!r:.200} is not a dense tensor"
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", ())):
        for name, moments in optimizer.get("state", {}).items():
            for moment, tensor in moments.items():
                if not _is_dense(tensor) if isinstance(tensor, Tensor) else moment == AVERAGE:
                    problem = f"optimizer.{number}.{name!r:.200}.{moment!r:.200} is not a dense tensor"
    if problem:
        raise UserError(f"{checkpoint_dir} cannot be read as a checkpoint: {problem}.")


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has real numbers and at least as many elements in memory as its shape says."""
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
        return False
    return (tensor.storage_offset() + tensor.numel()) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def flatten_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Flattens the tensors of a checkpoint into a dict.

    The keys are ``model.<parameter>`` and ``optimizer.<index>.<parameter>.<state>``, where ``<state>`` (such as
    ``exp_avg``) contains no dot.
    """
    flat = {f"model.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        for name, moments in optimizer["state"].items():
            flat |= {f"optimizer.{number}.{name}.{moment}": tensor for moment, tensor in moments.items()}
    return flat


def _unflatten_tensors(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """Inverts ``flatten_tensors``, into a checkpoint that already has everything but the tensors."""
    checkpoint["state_dict"] = {}
    for optimizer in checkpoint["optimizer_states"]:
        optimizer["state"] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            checkpoint["state_dict"][name] = tensor
        else:
            number, _, name = name.partition(".")
            name, _, moment = name.rpartition(".")
            checkpoint["optimizer_states"][int(number)]["state"].setdefault(name, {})[moment] = tensor
