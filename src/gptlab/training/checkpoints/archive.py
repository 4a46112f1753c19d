"""Checks archives of ``torch.save`` from somebody else before ``torch.load`` reads them.

``torch.load(weights_only=True)`` runs no code of the file, but calls functions that allocate memory of any size. The
archive's pickle is therefore interpreted first.
"""

import io
import pickle
import struct
import zipfile
from typing import IO, Any

import torch

from gptlab.training.checkpoints.pickled_data import STORAGE, PickledName, check_size, interpret

MAX_PICKLE_BYTES = 2**24  # without the tensors; that of GPT-2 XL and AdamW has less than 1 MB
MAX_SIZE_RATIO = 20  # of the plain data to its pickle, which has each repeated name once; that of GPT-2 XL has 3

_ENCODE = "_codecs.encode"  # of bytes, from a string in which each character is a byte
_CALLED = {
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter"),
    *("collections.OrderedDict", "torch.Size", "torch.device", "builtins.set", "__builtin__.set", _ENCODE),
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES = {
    f"torch.{name}": dtype
    for dtype, name in torch.storage._dtype_to_storage_type_map().items()  # noqa: SLF001  (not public elsewhere)
} | {"torch.storage.UntypedStorage": torch.uint8}


def check_archive(file: IO[bytes]) -> None:
    """Checks that an archive has only plain data and tensors, and needs no more memory than in proportion to its size.

    Args:
        file: The archive, at any position; afterwards it is at its beginning.

    Raises:
        UnpicklingError: Its pickle refers to other classes or functions than those of tensors and plain data.
        ValueError: An entry is compressed, as ``torch.save`` never does, entries overlap, the pickle is damaged
            or too large, or a tensor is larger than its data.
        OSError, zipfile.BadZipFile: It cannot be read, or is not a zip archive.
    """
    length = _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{packed[0]} is compressed, so its size is not limited.")
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"it must have one pickle of at most {MAX_PICKLE_BYTES:,} bytes.")
        folder = pickles[0].filename.rpartition("/")[0]
        sizes = {entry.filename: entry.file_size for entry in entries}
        if len(sizes) != len(entries) or any(entry.orig_filename != entry.filename for entry in entries):
            raise ValueError("the names of its entries are ambiguous.")
        if sum(sizes.values()) > length:
            raise ValueError("its entries overlap.")
        content = archive.read(pickles[0])
    file.seek(0)
    _check_pickle(content, {name.removeprefix(f"{folder}/data/"): size for name, size in sizes.items()})


def _check_directory(file: IO[bytes]) -> int:
    """Checks that the archive's directory is at its end, where every program looks for it; returns the file's length.

    ``zipfile`` and torch could otherwise read different directories: ``zipfile`` permits bytes before the archive.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, length - 98))
    tail = file.read(98)
    if len(tail) < 22:
        raise zipfile.BadZipFile("File is not a zip file")
    size, offset, comment = struct.unpack("<4x8xIIH", tail[-22:])
    end = length - 22
    if tail[-42:-38] == b"PK\6\7":  # zip64
        size, offset = struct.unpack("<QQ", tail[-58:-42])
        end = length - 98
        (located,) = struct.unpack("<8xQ4x", tail[-42:-22])
        if located != end or tail[:4] != b"PK\6\6":
            raise ValueError("the end of the archive is damaged.")
    if tail[-22:-18] != b"PK\5\6" or comment or offset + size != end:
        raise ValueError("the end of the archive is damaged.")
    return length


def _check_pickle(content: bytes, sizes: dict[str, int]) -> None:
    """Checks the pickle of an archive whose entries have the given sizes in bytes."""
    data, objects = interpret(content, _named, "collections.OrderedDict".__eq__)
    calls = [found.args for found in objects if found.name != STORAGE]
    check_size([data, *calls], MAX_SIZE_RATIO * (len(content) + 1000))
    for found in objects:
        if found.name == STORAGE:
            _, dtype, key, _, numel = found.args
            if numel * dtype.itemsize > sizes[key]:
                raise ValueError(f"a tensor is larger than its data in data/{key!s:.20}.")
        elif found.name == _ENCODE and found.args[1:] != ("latin1",):
            raise ValueError(f"it has bytes in the encoding {found.args[1:]!r:.50}.")


def _named(name: str) -> Any:
    """Returns the value of a name in a pickle; for a storage, its dtype."""
    if name in _CALLED:
        return PickledName(name)
    if name in _STORAGES:
        return _STORAGES[name]
    if name in _DTYPES:
        return _DTYPES[name]
    raise pickle.UnpicklingError(f"it refers to {name!r:.80}, which is neither a tensor nor plain data")
