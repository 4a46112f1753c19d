"""Reading checkpoints. Nothing is unpickled but tensors and plain data.

A checkpoint has ``global_step``, ``callbacks``, ``state_dict`` under GPT-2's own parameter names, and
``optimizer_states``, each with its moments by the parameter's name. state.pt has all of it; of a sharded one,
torch.distributed.checkpoint's files have the tensors of the last two, and state.pt the rest.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from gptlab.errors import UserError
from gptlab.training.averaging import AVERAGE
from gptlab.training.checkpoints.records import STATE

SHARDS = ".metadata"  # torch's description of the shards
Checkpoint = dict[str, Any]


def read(place: Path, wanted: Callable[[str], bool] = lambda key: True) -> Checkpoint:
    """Read a checkpoint onto the CPU; UserError where it holds anything but plain data.

    Args:
        place: Of the checkpoint.
        wanted: Which tensors of a sharded one, by the names of ``flatten``; state.pt is read as its tensors are used.
    """
    checkpoint = read_state(place)
    if is_sharded(place):
        reader = PlainReader(place)
        described = reader.read_metadata().state_dict_metadata
        tensors = {
            key: torch.empty(about.size, dtype=about.properties.dtype)
            for key, about in described.items()
            if isinstance(about, TensorStorageMetadata) and wanted(key)
        }
        load(tensors, storage_reader=reader, no_dist=True)
        _unflatten(tensors, checkpoint)
    return checkpoint


def read_weights(place: Path) -> dict[str, Tensor]:
    """Read the parameters of a checkpoint, or their averages where the run kept such; a tied matrix has one by wte."""
    checkpoint = read(place, lambda key: key.startswith("model.") or key.endswith(f".{AVERAGE}"))
    states = [optimizer["state"] for optimizer in checkpoint["optimizer_states"]]
    averages = {name: moments[AVERAGE] for state in states for name, moments in state.items() if AVERAGE in moments}
    return {**checkpoint["state_dict"], **averages}


def read_state(place: Path) -> Checkpoint:
    """Read state.pt; UserError for anything but tensors and plain data, which is not executed."""
    checkpoint = read_plain(place / STATE)
    if not isinstance(checkpoint, dict) or "global_step" not in checkpoint:
        raise UserError(f"{place / STATE} is not a checkpoint of gptlab: it has no global_step.")
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


def is_sharded(place: Path) -> bool:
    """Whether a checkpoint is of shards."""
    return (place / SHARDS).exists()


def read_shards(place: Path, tensors: dict[str, Tensor]) -> None:
    """Load, on every rank, its part of the shards into ``tensors``, which have the names of ``flatten``."""
    load(tensors, storage_reader=PlainReader(place))


def flatten(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name all tensors: model.<parameter>, optimizer.<number>.<parameter>.<moment>; no moment's name has a dot."""
    flat = {f"model.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for number, optimizer in enumerate(checkpoint["optimizer_states"]):
        for name, moments in optimizer["state"].items():
            flat |= {f"optimizer.{number}.{name}.{moment}": tensor for moment, tensor in moments.items()}
    return flat


def _unflatten(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """Undo ``flatten``, into a checkpoint that has the rest."""
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


class PlainReader(FileSystemReader):
    """torch's reader, except that the description of the shards, a pickle, may hold nothing but a description."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read which shard has what."""
        path = Path(self.path) / SHARDS
        try:
            metadata = _Description(io.BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(f"{path} cannot be read as the description of shards: {error}.") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} is not the description of shards.")
        return metadata


class _Description(pickle.Unpickler):
    """Unpickles what torch.distributed.checkpoint writes of shards; any other name is refused, not looked up."""

    ALLOWED = frozenset(
        {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
        | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
                *("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that descriptions are made of."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in self.ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
