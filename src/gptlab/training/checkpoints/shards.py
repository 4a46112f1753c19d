"""Reads the shards of torch.distributed.checkpoint (DCP) without executing anything that they contain.

DCP describes its shards in a pickle, ``.metadata``, and also pickles everything that is not a tensor. A checkpoint may
come from an untrusted source, so neither is unpickled. The description is read into placeholders, which do not refer to
classes or functions of any library, and a new ``Metadata`` is built from those that describe tensors. Anything else
raises an error.
"""

import io
import math
import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from gptlab.errors import UserError

# DCP has no public reader that does not unpickle, and no public class for the location of a chunk (``_StorageInfo``).
# The format and the names in its pickle (``_PLACEHOLDERS``) were read in torch 2.13.
METADATA = ".metadata"


def read_tensors(checkpoint_dir: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Reads full, unsharded tensors onto the CPU, without collectives.

    Args:
        checkpoint_dir: The checkpoint.
        wanted: Selects tensors by their names in the checkpoint.

    Raises:
        UserError: A shard is missing or damaged, or holds anything but tensors.
    """
    reader = ShardReader(checkpoint_dir)
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.zeros(about.size, dtype=about.properties.dtype)
        for name, about in described.items()
        if isinstance(about, TensorStorageMetadata) and wanted(name)
    }
    _load(reader, tensors, no_dist=True)
    return tensors


def load_shards(checkpoint_dir: Path, tensors: dict[str, Tensor]) -> None:
    """Loads each rank's shards into its distributed ``tensors``, in place; every rank must call this.

    Raises:
        UserError: See ``read_tensors``.
    """
    reader = ShardReader(checkpoint_dir)
    reader.read_metadata()  # raises its error here; DCP would wrap it in others
    _load(reader, tensors, no_dist=False)


def _load(reader: "ShardReader", tensors: dict[str, Tensor], *, no_dist: bool) -> None:
    try:
        load(tensors, storage_reader=reader, planner=_TensorPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        reasons = {f"{type(reason).__name__}: {reason}" for reason, _ in error.failures.values()}
        raise UserError(f"The shards of {reader.path} cannot be read: {'; '.join(sorted(reasons))}") from error


class ShardReader(FileSystemReader):
    """DCP's ``FileSystemReader``, except that ``.metadata`` is read once and not unpickled."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the description of the shards."""
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        return read_metadata(Path(self.path) / METADATA)


def read_metadata(path: Path) -> Metadata:
    """Reads DCP's description of tensors.

    Raises:
        UserError: The file is damaged, or describes anything but tensors stored completely in files next to it.
    """
    try:
        metadata = _metadata(_PlaceholderUnpickler(io.BytesIO(path.read_bytes())).load())
        sizes = {info.relative_path: 0 for info in metadata.storage_data.values()}
        sizes = {name: (path.parent / name).stat().st_size for name in sizes}
        _check_storage(metadata, sizes)
    except Exception as error:  # pickle raises many kinds of errors for a damaged file
        raise UserError(f"{path} cannot be read as the description of shards: {error}.") from error
    return metadata


class _TensorPlanner(DefaultLoadPlanner):
    """Load planner for tensors only; DCP's default planner unpickles everything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises UserError, as only pickles are loaded with this method."""
        raise UserError(f"{read_item.dest_index.fqn} is not stored as a tensor")


class _Placeholder:
    """Placeholder for an object of the pickle: its constructor arguments and its state."""

    has_state = False
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Self:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        if not self.has_state or self.state is not None:
            raise pickle.UnpicklingError(f"unexpected state of {type(self).__name__}")
        self.state = state


def _placeholder(name: str, *, has_state: bool) -> type[_Placeholder]:
    return type(name, (_Placeholder,), {"has_state": has_state})


# Keys: module and name in the pickle
_DCP_MODULE = "torch.distributed.checkpoint."
_PLACEHOLDERS = {
    **{
        (f"{_DCP_MODULE}{module}", name): _placeholder(name, has_state=True)
        for module, name in (
            ("metadata", "Metadata"),
            ("metadata", "MetadataIndex"),
            ("metadata", "TensorStorageMetadata"),
            ("metadata", "TensorProperties"),
            ("metadata", "ChunkStorageMetadata"),
            ("metadata", "StorageMeta"),
            ("filesystem", "_StorageInfo"),
        )
    },
    **{
        (module, name): _placeholder(name, has_state=False)
        for module, name in (
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            (f"{_DCP_MODULE}metadata", "_MEM_FORMAT_ENCODING"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),  # in Python 3.13
        )
    },
}


class _PlaceholderUnpickler(pickle.Unpickler):
    """Unpickler that creates placeholders; raises UnpicklingError for names that descriptions of tensors do not use."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns the placeholder class of a name, or a torch dtype."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _PLACEHOLDERS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which does not describe a tensor")
        return _PLACEHOLDERS[module, name]


def _metadata(found: Any) -> Metadata:
    """Builds a ``Metadata`` of tensors from placeholders and plain data; raises ValueError for anything else."""
    state = _state(found, "Metadata")
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        _plain(key, str): _tensor(entry) for key, entry in state["state_dict_metadata"].items()
    }
    stored = {_index(index): _storage(info) for index, info in state["storage_data"].items()}
    for index in stored:
        if index.fqn not in described:
            raise ValueError(f"{index.fqn} is stored but not described")
    return Metadata(described, storage_data=stored, storage_meta=StorageMeta(), version=state.get("version"))


def _check_storage(metadata: Metadata, sizes: dict[str, int]) -> None:
    """Checks that every tensor is stored completely: its chunks fill it and are within files of the given sizes.

    Raises:
        ValueError: A chunk is missing or out of bounds, or the chunks do not fill their tensor.
    """
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # noqa: S101
        filled = 0
        for chunk in tensor.chunks:
            numel = math.prod(chunk.sizes)
            info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is None or info.length < numel * tensor.properties.dtype.itemsize:
                raise ValueError(f"a chunk of {name} is not stored")
            if info.offset < 0 or info.offset + info.length > sizes[info.relative_path]:
                raise ValueError(f"a chunk of {name} is outside of {info.relative_path}")
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if any(end > size for end, size in zip(ends, tensor.size, strict=True)):
                raise ValueError(f"a chunk of {name} is outside of the tensor")
            filled += numel
        if filled != math.prod(tensor.size):
            raise ValueError(f"the chunks of {name} do not fill it")


def _tensor(found: Any) -> TensorStorageMetadata:
    state = _state(found, "TensorStorageMetadata")
    dtype = _properties(state["properties"])
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in _plain(state["chunks"], list)]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(state["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _properties(found: Any) -> torch.dtype:
    """Returns the dtype, the only property of a tensor that is used."""
    if not isinstance(found, _PLACEHOLDERS[f"{_DCP_MODULE}metadata", "TensorProperties"]):
        raise ValueError(f"expected the properties of a tensor, got {found!r:.40}")
    return _plain(_plain(found.state, tuple)[0], torch.dtype)


def _index(found: Any) -> MetadataIndex:
    state = _state(found, "MetadataIndex")
    index = state.get("index")
    return MetadataIndex(_plain(state["fqn"], str), _size(state["offset"]), index and _plain(index, int))


def _storage(found: Any) -> _StorageInfo:
    state = _state(found, "_StorageInfo", "filesystem")
    name, offset, length = _plain(state["relative_path"], str), state["offset"], state["length"]
    if PurePath(name).name != name or name == ".." or state.get("transform_descriptors"):
        raise ValueError(f"the shard {name} is in another directory or transformed")
    return _StorageInfo(name, _plain(offset, int), _plain(length, int))


def _size(found: Any) -> torch.Size:
    if not isinstance(found, _PLACEHOLDERS["torch", "Size"]):
        raise ValueError(f"expected a size, got {found!r:.40}")
    sizes = [_plain(size, int) for size in _plain(found.args[0], tuple)]
    if min(sizes, default=0) < 0 or math.prod(sizes) > 2**62:
        raise ValueError(f"invalid size {sizes}")
    return torch.Size(sizes)


def _state(found: Any, name: str, module: str = "metadata") -> dict[str, Any]:
    """Returns the fields of a DCP object."""
    if not isinstance(found, _PLACEHOLDERS[f"{_DCP_MODULE}{module}", name]):
        raise ValueError(f"expected {name}, got {found!r:.40}")
    return _plain(found.state, dict)


def _plain(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {value!r:.40}")
    return value
