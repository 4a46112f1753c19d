"""Sharded checkpoints: each rank's tensors in a safetensors file, and an index of all of them. Nothing is unpickled.

torch.distributed.checkpoint (DCP) plans which rank writes and reads which part of a tensor. ``shards.json`` has the
shape of every tensor and the position of each shard in it. A checkpoint may come from an untrusted source, so its index
and its files are checked before they are used. ``dcp_format.py`` reads checkpoints of earlier versions.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from gptlab.config.base import FrozenConfig
from gptlab.errors import UserError, failure_reason
from gptlab.files import fsync_path, is_plain_name, open_regular, read_regular
from gptlab.training.checkpoints.dcp_format import METADATA, DCPReader, TensorPlanner
from gptlab.training.checkpoints.safetensors_file import write_safetensors

INDEX = "shards.json"
MAX_INDEX_BYTES = 100_000_000  # as the header of a safetensors file (huggingface/safetensors, README, "Format")

Sizes = Annotated[tuple[Annotated[int, Field(ge=0, le=2**40)], ...], Field(max_length=8)]


class ShardedTensor(FrozenConfig):
    """Shape of a tensor, and the position of its shard in each file that has one."""

    shape: Sizes
    offsets: dict[str, Sizes]


class ShardIndex(FrozenConfig):
    """Contents of shards.json."""

    format: Literal[1]
    tensors: dict[str, ShardedTensor]


def is_sharded(checkpoint_dir: Path) -> bool:
    """Returns whether a checkpoint is sharded."""
    return (checkpoint_dir / INDEX).exists() or (checkpoint_dir / METADATA).exists()


def save_shards(tensors: dict[str, Tensor], folder: Path, rank: int, group: Any = None) -> None:
    """Writes each rank's shards of its distributed ``tensors``; every rank of ``group`` must call this.

    Raises:
        CheckpointException: A rank could not write its file.
    """
    save(tensors, storage_writer=_ShardWriter(folder, rank), process_group=group, no_dist=group is None)


def read_tensors(checkpoint_dir: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Reads full, unsharded tensors onto the CPU, without collectives.

    Args:
        checkpoint_dir: The checkpoint.
        wanted: Selects tensors by their names in the checkpoint.

    Raises:
        UserError: A shard is missing or damaged, or holds anything but tensors.
    """
    reader = _open(checkpoint_dir)
    tensors = {
        name: torch.zeros(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and wanted(name)
    }
    _load(reader, checkpoint_dir, tensors, no_dist=True)
    return tensors


def load_shards(checkpoint_dir: Path, tensors: dict[str, Tensor]) -> None:
    """Loads each rank's shards into its distributed ``tensors``, in place; every rank must call this.

    Raises:
        UserError: See ``read_tensors``; or the checkpoint does not have one of ``tensors`` in its shape.
    """
    _load(_open(checkpoint_dir), checkpoint_dir, tensors, no_dist=False)


def _load(reader: StorageReader, checkpoint_dir: Path, tensors: dict[str, Tensor], *, no_dist: bool) -> None:
    try:
        load(tensors, storage_reader=reader, planner=TensorPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        reasons = {f"{type(reason).__name__}: {reason}" for reason, _ in error.failures.values()}
        raise UserError(f"The shards of {checkpoint_dir} cannot be read: {'; '.join(sorted(reasons))}") from error


def _open(checkpoint_dir: Path) -> StorageReader:
    """Returns a reader of a checkpoint in which every element of each tensor is stored once."""
    path = checkpoint_dir / (INDEX if (checkpoint_dir / INDEX).exists() else METADATA)
    try:
        reader: StorageReader = ShardReader(checkpoint_dir) if path.name == INDEX else DCPReader(checkpoint_dir)
        for name, tensor in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)  # noqa: S101
            if not _is_grid(tensor.size, tensor.chunks):
                raise ValueError(f"the shards of {name!r} do not store each of its elements once")
    except Exception as error:  # pydantic, safetensors and the reader of pickles raise many kinds of errors
        raise UserError(
            f"{path} cannot be read as the index of shards: {failure_reason(error).rstrip('.')}."
        ) from error
    return reader


def _is_grid(shape: torch.Size, chunks: list[ChunkStorageMetadata]) -> bool:
    """Returns whether chunks are the cells of a grid, as those of a tensor sharded over any dimensions are."""
    if 0 in shape:
        return math.prod(size or 1 for size in shape) < 2**62  # torch multiplies them for the strides
    chunks = [chunk for chunk in chunks if 0 not in chunk.sizes]  # of an unevenly sharded tensor, a rank may have none
    if any(len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks):
        return False
    cuts = [sorted({0, size, *(chunk.offsets[dim] for chunk in chunks)}) for dim, size in enumerate(shape)]
    next_cuts = [dict(pairwise(cut)) for cut in cuts]
    cells = {
        tuple(chunk.offsets)
        for chunk in chunks
        if all(
            ends.get(start) == start + size
            for ends, start, size in zip(next_cuts, chunk.offsets, chunk.sizes, strict=True)
        )
    }
    return len(cells) == len(chunks) == math.prod(map(len, next_cuts))


class _ShardWriter(StorageWriter):
    """DCP storage writer: one safetensors file per rank and, on the first rank, the index."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.file = folder, f"shard_{rank:05d}.safetensors"

    def reset(self, checkpoint_id: Any = None) -> None:
        """Does nothing."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Returns the plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's shards; ``storage_data`` of each result is the name of the file."""
        items, path = plan.items, self.folder / self.file
        tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in items}
        assert len(tensors) == len(items)  # noqa: S101  (a rank has one shard of a DTensor)
        write_safetensors(tensors, {name: tensor.dtype for name, tensor in tensors.items()}, path)
        fsync_path(path)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(item.index, tensors[item.index.fqn].nbytes, self.file) for item in items])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index."""
        offsets: dict[str, dict[str, Sizes]] = {name: {} for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            offsets[result.index.fqn][result.storage_data] = tuple(result.index.offset or ())
        tensors = {
            name: ShardedTensor(shape=tuple(about.size), offsets=offsets[name])
            for name, about in metadata.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }
        (self.folder / INDEX).write_text(ShardIndex(format=1, tensors=tensors).model_dump_json(), encoding="utf-8")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Returns True."""
        return True


class ShardReader(StorageReader):
    """DCP storage reader for the files of ``save_shards``, which are memory-mapped.

    Raises:
        OSError, ValueError, SafetensorError: A file is missing or damaged, or differs from the index.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        index = read_index(checkpoint_dir)
        names: dict[str, set[str]] = {}  # of the tensors in each file
        for name, tensor in index.tensors.items():
            for file in tensor.offsets:
                names.setdefault(file, set()).add(name)
        shards = {file: _open_shard(checkpoint_dir, file, expected) for file, expected in names.items()}
        self._chunks: dict[MetadataIndex, Tensor] = {}
        self._metadata = Metadata({})
        for name, tensor in index.tensors.items():
            chunks = [(torch.Size(offsets), shards[file][name]) for file, offsets in tensor.offsets.items()]
            dtypes = {chunk.dtype for _, chunk in chunks}
            if len(dtypes) != 1:
                raise ValueError(f"{name!r} is stored in {len(dtypes)} dtypes" if dtypes else f"{name!r} has no shards")
            self._chunks |= {MetadataIndex(name, offsets): chunk for offsets, chunk in chunks if chunk.numel()}
            self._metadata.state_dict_metadata[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtypes.pop()),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(offsets, chunk.shape) for offsets, chunk in chunks],
            )

    def reset(self, checkpoint_id: Any = None) -> None:
        """Does nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the description of the shards."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the shards, or the parts of them that this rank needs, into its tensors."""
        for item in plan.items:
            chunk = self._chunks[item.storage_index]
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                chunk = chunk.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(chunk)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Returns True."""
        return True


def read_index(checkpoint_dir: Path) -> ShardIndex:
    """Reads shards.json; raises OSError or ValueError if it is missing or invalid."""
    return ShardIndex.model_validate_json(read_regular(checkpoint_dir / INDEX, MAX_INDEX_BYTES))


def _open_shard(checkpoint_dir: Path, file: str, expected: set[str]) -> dict[str, Tensor]:
    """Memory-maps the tensors of a file; safetensors checks that they fill it."""
    if not is_plain_name(file):
        raise ValueError(f"{file!r:.200} is not a file in the directory of the checkpoint")
    try:
        open_regular(checkpoint_dir / file).close()  # load_file would follow a link
        tensors = load_file(checkpoint_dir / file)
    except OSError as error:
        raise ValueError(f"{file!r}: {failure_reason(error)}") from error
    except SafetensorError as error:
        raise ValueError(f"{file!r} is damaged: {error}") from error
    if different := tensors.keys() ^ expected:
        raise ValueError(f"only one of {file!r} and the index has {min(different)!r}")
    return tensors
