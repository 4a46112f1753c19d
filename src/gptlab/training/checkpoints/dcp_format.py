"""Reads the sharded checkpoints of earlier versions: the format of torch.distributed.checkpoint (DCP).

DCP describes its shards in a pickle, ``.metadata``, and also pickles everything that is not a tensor. A checkpoint may
come from an untrusted source, so neither is unpickled: the opcodes of the description that build plain data are
interpreted, and a new ``Metadata`` is built from the result. Anything else raises an error.
"""

import io
import math
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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


def read_metadata(path: Path) -> Metadata:
    """Reads DCP's description of tensors.

    Raises:
        UserError: The file is damaged, or describes anything but tensors stored in files next to it.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError(f"it is not a file of at most {MAX_METADATA_BYTES:,} bytes")
        metadata = _metadata(_interpret(path.read_bytes()))
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


class _Name(str):
    """Name of a class or function in a pickle."""

    __slots__ = ()


@dataclass(eq=False)
class _Object:
    """Object of a pickle: the name of its class or function, the arguments of the call, and its state."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


def _interpret(content: bytes) -> Any:
    """Returns the plain data of a pickle, with an ``_Object`` for each object; imports and calls nothing.

    Raises:
        ValueError, IndexError, TypeError, AttributeError: The pickle is damaged, or has other opcodes or names than
            those that protocols 4 and 5 use for the description of tensors.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stack below each MARK
    memo: list[Any] = []
    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[cast(int, argument)])
            case "MARK":
                marks.append(stack)
                stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _plain(stack[-1], list).append(item)
            case "APPENDS":
                items, stack = stack, marks.pop()
                _plain(stack[-1], list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _plain(stack[-1], dict)[_key(key)] = value
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _plain(stack[-1], dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
            case "STACK_GLOBAL":
                name, module = _plain(stack.pop(), str), _plain(stack.pop(), str)
                stack.append(_named(f"{module}.{name}"))
            case "NEWOBJ" | "REDUCE":
                args, called = _plain(stack.pop(), tuple), _plain(stack.pop(), _Name)
                stack.append(_Object(called, args))
            case "BUILD":
                state, built = stack.pop(), _plain(stack[-1], _Object)
                if built.name not in _WITH_STATE or built.state is not None:
                    raise ValueError(f"{built.name} has an unexpected state")
                built.state = state
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"it has the opcode {other}, which does not describe a tensor")
    raise ValueError("it has no end")


def _named(name: str) -> torch.dtype | _Name:
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _WITH_STATE or name in _STATELESS:
        return _Name(name)
    raise ValueError(f"it refers to {name!r:.80}, which does not describe a tensor")


def _key(key: Any) -> Any:
    """Returns a key of a dict; others, such as nested tuples, may take forever to hash."""
    if not isinstance(key, str | _Object):
        raise ValueError(f"a key is of the type {type(key).__name__}")
    return key


def _metadata(found: Any) -> Metadata:
    """Builds a ``Metadata`` of tensors from placeholders and plain data; raises ValueError for anything else."""
    state = _state(found, "Metadata")
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        _plain(key, str): _tensor(entry) for key, entry in state["state_dict_metadata"].items()
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
        ValueError: A chunk is missing or out of bounds.
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
    found = _object(found, f"{_DCP}.metadata.TensorProperties")
    return _plain(_plain(found.state, tuple)[0], torch.dtype)


def _index(found: Any) -> MetadataIndex:
    state = _state(found, "MetadataIndex")
    index = state.get("index")
    return MetadataIndex(_plain(state["fqn"], str), _size(state["offset"]), index and _plain(index, int))


def _storage(found: Any) -> _StorageInfo:
    state = _state(found, "_StorageInfo", "filesystem")
    name, offset, length = _plain(state["relative_path"], str), state["offset"], state["length"]
    if not is_plain_name(name) or state.get("transform_descriptors"):
        raise ValueError(f"the shard {name!r} is in another directory or transformed")
    return _StorageInfo(name, _plain(offset, int), _plain(length, int))


def _size(found: Any) -> torch.Size:
    sizes = [_plain(size, int) for size in _plain(_object(found, "torch.Size").args[0], tuple)]
    if min(sizes, default=0) < 0 or math.prod(sizes) > 2**62:
        raise ValueError(f"invalid size {sizes}")
    return torch.Size(sizes)


def _state(found: Any, name: str, module: str = "metadata") -> dict[str, Any]:
    """Returns the fields of a DCP object."""
    fields: dict[str, Any] = _plain(_object(found, f"{_DCP}.{module}.{name}").state, dict)
    return fields


def _object(found: Any, name: str) -> _Object:
    if not isinstance(found, _Object) or found.name != name:
        raise ValueError(f"expected {name.rpartition('.')[2]}, got {type(found).__name__}")
    return found


def _plain(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
