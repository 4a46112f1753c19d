"""Reads the sharded checkpoints of earlier versions: the format of torch.distributed.checkpoint (DCP).

DCP describes its shards in a pickle, ``.metadata``, and also pickles everything that is not a tensor. A checkpoint may
come from an untrusted source, so neither is unpickled: the opcodes of the description that build plain data are
interpreted, and a new ``Metadata`` is built from the result. Anything else raises an error.
"""

import io
import math
from collections import Counter
from pathlib import Path
from typing import IO, Any

import torch
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

from gptlab.errors import UserError
from gptlab.files import is_plain_name
from gptlab.training.checkpoints.archive import check_archive
from gptlab.training.checkpoints.pickled_data import PickledName, PickledObject, interpret, plain
from gptlab.training.checkpoints.safetensors_file import SAFETENSORS

# DCP has no public reader that does not unpickle, and no public class for the location of a chunk (``_StorageInfo``).
# The format and the names in its pickle were read in torch 2.13.
METADATA = ".metadata"
MAX_METADATA_BYTES = 100_000_000

_DCP = "torch.distributed.checkpoint"
# Objects with a state (opcode BUILD), and those without
_WITH_STATE = {
    *(f"{_DCP}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "StorageMeta")),
    *(f"{_DCP}.metadata.{name}" for name in ("TensorProperties", "ChunkStorageMetadata")),
    f"{_DCP}.filesystem._StorageInfo",
}
_STATELESS = {
    *("torch.Size", "torch.serialization._get_layout", f"{_DCP}.metadata._MEM_FORMAT_ENCODING"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),  # the latter in Python 3.13
}
_DTYPES = {str(dtype): dtype for dtype in SAFETENSORS}


class DCPReader(FileSystemReader):
    """DCP's ``FileSystemReader``, except that ``.metadata`` is read once and not unpickled.

    Raises:
        UserError: See ``read_metadata``.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        super().__init__(checkpoint_dir)
        self._metadata = read_metadata(checkpoint_dir / METADATA)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the description of the shards."""
        return self._metadata

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        """Returns the archive of a chunk, which DCP reads with ``torch.load``; raises ValueError if it is unsafe."""
        file.seek(sinfo.offset)
        chunk = io.BytesIO(file.read(sinfo.length))
        check_archive(chunk)
        return chunk


def read_metadata(path: Path) -> Metadata:
    """Reads DCP's description of tensors.

    Raises:
        UserError: The file is damaged, or describes anything but tensors stored in files next to it.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError(f"it is not a file of at most {MAX_METADATA_BYTES:,} bytes")
        metadata = _metadata(interpret(path.read_bytes(), _named, _WITH_STATE.__contains__)[0])
        sizes = {info.relative_path: 0 for info in metadata.storage_data.values()}
        sizes = {name: _size_of_file(path.parent / name) for name in sizes}
        _check_storage(metadata, sizes)
    except Exception as error:  # damaged opcodes raise many kinds of errors
        raise UserError(f"{path} cannot be read as the index of shards: {error}.") from error
    return metadata


class TensorPlanner(DefaultLoadPlanner):
    """Load planner for tensors only; DCP's default planner unpickles everything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises UserError, as only pickles are loaded with this method."""
        raise UserError(f"{read_item.dest_index.fqn!r} is not stored as a tensor")


def _named(name: str) -> torch.dtype | PickledName:
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _WITH_STATE or name in _STATELESS:
        return PickledName(name)
    raise ValueError(f"it refers to {name!r:.80}, which does not describe a tensor")


def _metadata(found: Any) -> Metadata:
    """Builds a ``Metadata`` of tensors from placeholders and plain data; raises ValueError for anything else."""
    state = _state(found, "Metadata")
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        plain(key, str): _tensor(entry) for key, entry in state["state_dict_metadata"].items()
    }
    stored = {_index(index): _storage(info) for index, info in state["storage_data"].items()}
    for index in stored:
        if index.fqn not in described:
            raise ValueError(f"{index.fqn!r} is stored but not described")
    return Metadata(described, storage_data=stored, storage_meta=StorageMeta(), version=state.get("version"))


def _size_of_file(path: Path) -> int:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name!r} is not a regular file")
    return path.stat().st_size


def _check_storage(metadata: Metadata, sizes: dict[str, int]) -> None:
    """Checks that every chunk is stored, within files of the given sizes.

    Raises:
        ValueError: A chunk is missing or out of bounds, or chunks overlap.
    """
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # noqa: S101
        for chunk in tensor.chunks:
            numel = math.prod(chunk.sizes)
            info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is None or info.length < numel * tensor.properties.dtype.itemsize:
                raise ValueError(f"a chunk of {name!r} is not stored")
            if info.offset < 0 or info.offset + info.length > sizes[info.relative_path]:
                raise ValueError(f"a chunk of {name!r} is outside of {info.relative_path!r}")
    used = Counter[str]()
    for info in metadata.storage_data.values():
        used[info.relative_path] += info.length
    if larger := [name for name, length in used.items() if length > sizes[name]]:
        raise ValueError(f"the chunks of {larger[0]!r} overlap")


def _tensor(found: Any) -> TensorStorageMetadata:
    state = _state(found, "TensorStorageMetadata")
    dtype = _properties(state["properties"])
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in plain(state["chunks"], list)]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(state["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _properties(found: Any) -> torch.dtype:
    """Returns the dtype, the only property of a tensor that is used."""
    found = _object(found, f"{_DCP}.metadata.TensorProperties")
    return plain(plain(found.state, tuple)[0], torch.dtype)


def _index(found: Any) -> MetadataIndex:
    state = _state(found, "MetadataIndex")
    index = state.get("index")
    return MetadataIndex(plain(state["fqn"], str), _size(state["offset"]), index and plain(index, int))


def _storage(found: Any) -> _StorageInfo:
    state = _state(found, "_StorageInfo", "filesystem")
    name, offset, length = plain(state["relative_path"], str), state["offset"], state["length"]
    if not is_plain_name(name) or state.get("transform_descriptors"):
        raise ValueError(f"the shard {name!r} is in another directory or transformed")
    return _StorageInfo(name, plain(offset, int), plain(length, int))


def _size(found: Any) -> torch.Size:
    sizes = [plain(size, int) for size in plain(_object(found, "torch.Size").args[0], tuple)]
    if min(sizes, default=0) < 0 or math.prod(sizes) > 2**62:
        raise ValueError(f"invalid size {sizes}")
    return torch.Size(sizes)


def _state(found: Any, name: str, module: str = "metadata") -> dict[str, Any]:
    """Returns the fields of a DCP object."""
    fields: dict[str, Any] = plain(_object(found, f"{_DCP}.{module}.{name}").state, dict)
    return fields


def _object(found: Any, name: str) -> PickledObject:
    if not isinstance(found, PickledObject) or found.name != name:
        raise ValueError(f"expected {name.rpartition('.')[2]}, got {type(found).__name__}")
    return found
