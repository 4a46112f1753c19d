"""Reading checkpoints. Nothing is unpickled but tensors and plain data.

A checkpoint has ``global_step``, ``callbacks``, ``state_dict`` under GPT-2's own parameter names, and
``optimizer_states``, each with its moments by the parameter's name. state.pt has all of it; of a sharded one,
torch.distributed.checkpoint's files have the tensors of the last two, and state.pt the rest.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import UserError
from gptlab.training.checkpoints.records import STATE
from gptlab.training.checkpoints.shards import METADATA, read_tensors
from gptlab.training.optim.averaging import AVERAGE

Checkpoint = dict[str, Any]
# Earlier names of callbacks: Lightning keeps a callback's state in state.pt under the name of its class.
RENAMED_CALLBACKS = {
    "Guard": "TrainingHealthMonitor",
    "Recorder": "MetricsCallback",
    "Checkpoints": "RunCheckpoint",
}


def read_checkpoint(checkpoint_dir: Path, wanted: Callable[[str], bool] = lambda key: True) -> Checkpoint:
    """Read a checkpoint onto the CPU; UserError where it holds anything but plain data.

    Args:
        checkpoint_dir: Of the checkpoint.
        wanted: Selects the tensors of a sharded checkpoint by the names of ``flatten_tensors``; those of state.pt are
            mapped and read as they are used.
    """
    checkpoint = read_state(checkpoint_dir)
    if is_sharded(checkpoint_dir):
        try:
            _unflatten_tensors(read_tensors(checkpoint_dir, wanted), checkpoint)
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(f"The shards of {checkpoint_dir} do not belong to its {STATE}: {error!r}.") from error
    return checkpoint


def read_weights(checkpoint_dir: Path) -> dict[str, Tensor]:
    """Read the parameters of a checkpoint, or their averages where the run kept such; a tied matrix has one by wte."""
    checkpoint = read_checkpoint(checkpoint_dir, lambda key: key.startswith("model.") or key.endswith(f".{AVERAGE}"))
    states = [optimizer["state"] for optimizer in checkpoint["optimizer_states"]]
    averages = {name: moments[AVERAGE] for state in states for name, moments in state.items() if AVERAGE in moments}
    return {**checkpoint["state_dict"], **averages}


def read_state(checkpoint_dir: Path) -> Checkpoint:
    """Read state.pt; UserError for anything but tensors and plain data, which is not executed."""
    checkpoint = read_plain(checkpoint_dir / STATE)
    if not isinstance(checkpoint, dict) or "global_step" not in checkpoint:
        raise UserError(f"{checkpoint_dir / STATE} is not a checkpoint of gptlab: it has no global_step.")
    states = checkpoint.get("callbacks", {})
    checkpoint["callbacks"] = {RENAMED_CALLBACKS.get(name, name): state for name, state in states.items()}
    return checkpoint


def read_plain(path: Path) -> Any:
    """Read plain data and tensors that ``torch.save`` wrote; UserError where the file holds, or is, anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # torch would advise to run it
        raise UserError(
            f"{path} is refused: it holds more than tensors and plain data, which could run any code. "
            "Nothing of it was run."
        ) from error
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path} cannot be read as a checkpoint: {error}") from error


def is_sharded(checkpoint_dir: Path) -> bool:
    """Whether a checkpoint is of shards."""
    return (checkpoint_dir / METADATA).exists()


def flatten_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name all tensors: model.<parameter>, optimizer.<number>.<parameter>.<moment>; no moment's name has a dot."""
    flat = {f"model.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        for name, moments in optimizer["state"].items():
            flat |= {f"optimizer.{number}.{name}.{moment}": tensor for moment, tensor in moments.items()}
    return flat


def _unflatten_tensors(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """Undo ``flatten_tensors``, into a checkpoint that has the rest."""
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
