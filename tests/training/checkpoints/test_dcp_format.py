"""Sharded checkpoints of earlier versions, written by DCP, are read without unpickling."""

import copy
import dataclasses
import io
import os
import pickle
import pickletools
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from canary import Canary
from gptlab.errors import UserError
from gptlab.training.checkpoints.dcp_format import TensorPlanner, read_metadata
from gptlab.training.checkpoints.reading import read_checkpoint
from gptlab.training.checkpoints.shards import load_shards, read_tensors

NAME = "model.wte.weight"
TENSORS = {
    NAME: torch.arange(6.0).reshape(3, 2),
    "model.half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "optimizer.0.wte.weight.step": torch.tensor(7.0),
}


@pytest.fixture
def checkpoint_dir(tmp_path) -> Path:
    """A sharded checkpoint written by DCP."""
    checkpoint_dir = tmp_path / "step_000001"
    save(copy.deepcopy(TENSORS), storage_writer=FileSystemWriter(checkpoint_dir), no_dist=True)
    state = {"global_step": 1, "callbacks": {}, "optimizer_states": [{"param_groups": []}]}
    torch.save(state, checkpoint_dir / "state.pt")
    return checkpoint_dir


def unpickled_metadata(checkpoint_dir: Path) -> Metadata:
    return pickle.loads((checkpoint_dir / ".metadata").read_bytes())  # noqa: S301  (as DCP does)


def test_metadata_equals_that_read_by_dcp(checkpoint_dir):
    found, expected = read_metadata(checkpoint_dir / ".metadata"), unpickled_metadata(checkpoint_dir)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    assert [index.index for index in found.storage_data] == [index.index for index in expected.storage_data]
    assert found.version == expected.version


def test_a_chunk_is_described_by_file_offset_and_length(checkpoint_dir):
    names = [field.name for field in dataclasses.fields(_StorageInfo)]
    assert names == ["relative_path", "offset", "length", "transform_descriptors"]
    size = sum(tensor.nbytes for tensor in TENSORS.values())
    for info in unpickled_metadata(checkpoint_dir).storage_data.values():
        assert info.transform_descriptors is None
        assert 0 <= info.offset < info.offset + info.length <= (checkpoint_dir / info.relative_path).stat().st_size
        assert info.length > size / 4


def test_read_tensors_equal_the_written_ones(checkpoint_dir):
    found = read_tensors(checkpoint_dir, lambda name: True)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert read_tensors(checkpoint_dir, lambda name: name.startswith("optimizer.")).keys() == {
        "optimizer.0.wte.weight.step"
    }
    checkpoint = read_checkpoint(checkpoint_dir)
    assert torch.equal(checkpoint["state_dict"]["wte.weight"], TENSORS[NAME])


def hide_payload(checkpoint_dir: Path, canary: Canary) -> Metadata:
    """Appends a pickle to the shards; returns metadata in which a tensor is stored there."""
    content = io.BytesIO()
    torch.save(canary, content)
    shard = checkpoint_dir / "__0_0.distcp"
    offset = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + content.getvalue())
    description = unpickled_metadata(checkpoint_dir)
    description.storage_data[MetadataIndex(NAME)] = _StorageInfo(shard.name, offset, len(content.getvalue()))
    return description


def write_entry_of_bytes(checkpoint_dir: Path, canary: Canary) -> None:
    """Writes metadata in which a tensor is stored as bytes, which DCP's planner unpickles."""
    description = hide_payload(checkpoint_dir, canary)
    description.state_dict_metadata[NAME] = BytesStorageMetadata()
    (checkpoint_dir / ".metadata").write_bytes(pickle.dumps(description))


class Layout:
    """Object whose unpickled value depends on the cache of ``_get_layout``, which the first reading changes."""

    def __reduce__(self):
        return torch.serialization._get_layout, ("torch.strided",)


def write_entry_that_changes(checkpoint_dir: Path, canary: Canary) -> None:
    """Writes metadata whose first unpickling gives a tensor, and whose second gives bytes.

    The first sets the cache of ``torch.serialization._get_layout``, by a BUILD opcode on that function.
    """
    description = hide_payload(checkpoint_dir, canary)
    description.state_dict_metadata[Layout()] = BytesStorageMetadata()
    poison = pickle.dumps({"cache": {"torch.strided": NAME}}, protocol=2)[2:-1]
    content = pickle.dumps(description, protocol=2)[:-1] + b"ctorch.serialization\n_get_layout\n" + poison + b"b0."
    (checkpoint_dir / ".metadata").write_bytes(content)


@pytest.fixture
def layouts(monkeypatch):
    monkeypatch.setattr(torch.serialization._get_layout, "cache", {})


@pytest.mark.parametrize("write", [write_entry_of_bytes, write_entry_that_changes])
def test_a_pickle_stored_as_a_tensor_is_not_executed(checkpoint_dir, tmp_path, layouts, write):
    canary = Canary(tmp_path / "canary")
    write(checkpoint_dir, canary)
    for attempt in (
        lambda: read_checkpoint(checkpoint_dir),
        lambda: read_tensors(checkpoint_dir, lambda name: True),
        lambda: load_shards(checkpoint_dir, copy.deepcopy(TENSORS)),
    ):
        with pytest.raises(UserError, match="cannot be read as the index of shards"):
            attempt()
        assert not canary.was_run()
        assert NAME not in torch.serialization._get_layout.cache.values()
    # DCP executes it
    reader = FileSystemReader(checkpoint_dir)
    shown = reader.read_metadata().state_dict_metadata[NAME]
    assert isinstance(shown, TensorStorageMetadata) == (write is write_entry_that_changes)
    load({NAME: torch.empty(3, 2)}, storage_reader=reader, no_dist=True)
    assert canary.was_run()


def test_the_load_planner_does_not_unpickle_bytes(tmp_path):
    """Checks the planner, which is a second line of defense after the metadata."""
    canary, content = Canary(tmp_path / "canary"), io.BytesIO()
    torch.save(canary, content)
    item = SimpleNamespace(dest_index=MetadataIndex(NAME))
    with pytest.raises(UserError, match=f"'{NAME}' is not stored as a tensor"):
        TensorPlanner().load_bytes(item, content)
    assert not canary.was_run()


def negative_size(description: Metadata) -> None:
    description.state_dict_metadata[NAME].chunks[0] = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([-3, 2]))


def shard_in_another_directory(description: Metadata) -> None:
    for info in description.storage_data.values():
        info.relative_path = "../step_000002/__0_0.distcp"


def text_instead_of_tensor(description: Metadata) -> None:
    description.state_dict_metadata[NAME] = "tensor"


def without_chunks(description: Metadata) -> None:
    description.state_dict_metadata[NAME].chunks.clear()


def larger_than_its_chunks(description: Metadata) -> None:
    description.state_dict_metadata[NAME].size = torch.Size([2**30, 2])


def larger_than_its_bytes(description: Metadata) -> None:
    larger_than_its_chunks(description)
    description.state_dict_metadata[NAME].chunks[0].sizes = torch.Size([2**30, 2])


def beyond_its_file(description: Metadata) -> None:
    description.storage_data[MetadataIndex(NAME, (0, 0))].length = 10**9


def without_description(description: Metadata) -> None:
    del description.state_dict_metadata[NAME]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (negative_size, r"size \[-3, 2\]"),
        (shard_in_another_directory, r"\.\./step_000002"),
        (text_instead_of_tensor, "expected TensorStorageMetadata, got str"),
        (without_chunks, f"shards of '{NAME}' do not store each of its elements once"),
        (larger_than_its_chunks, f"shards of '{NAME}' do not store each of its elements once"),
        (larger_than_its_bytes, f"a chunk of '{NAME}' is not stored"),
        (beyond_its_file, f"a chunk of '{NAME}' is outside of '__0_0.distcp'"),
        (without_description, f"'{NAME}' is stored but not described"),
    ],
)
def test_invalid_metadata_raises(checkpoint_dir, change, reason):
    description = unpickled_metadata(checkpoint_dir)
    change(description)
    (checkpoint_dir / ".metadata").write_bytes(pickle.dumps(description))
    with pytest.raises(UserError, match=rf"\.metadata cannot be read as the index of shards: .*{reason}"):
        read_tensors(checkpoint_dir, lambda name: True)


CALLS = ("os.system", "exec", "compile", "import", "pickle.find_class")


def test_damaged_metadata_raises_only_user_errors(checkpoint_dir):
    path = checkpoint_dir / ".metadata"
    content = path.read_bytes()
    generator = random.Random(1)  # noqa: S311  (no secret)
    opcodes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    positions = [position for _, _, position in pickletools.genops(content)]
    reading: list[bool] = []
    foreign = [b"\x8c\x02os\x8c\x06system", b"\x8c\x08builtins\x8c\x04eval", b"\x8c\x05torch\x8c\x04load"]
    imported_and_called = []
    sys.addaudithook(lambda event, _: imported_and_called.append(event) if event in CALLS and reading else None)
    refused = 0
    for number in range(200):
        damaged, at = bytearray(content), generator.choice(positions)
        if number % 2:
            damaged[at : at + 1] = generator.choice(opcodes)
        else:  # a call of a function
            damaged[at:at] = generator.choice(foreign) + b"\x93\x8c\x04true\x85R"
        path.write_bytes(damaged)
        reading.append(True)
        try:
            assert len(read_metadata(path).state_dict_metadata) <= len(TENSORS)
        except UserError:
            refused += 1
        finally:
            reading.clear()
    assert imported_and_called == []
    assert refused > 150


def test_nested_tuples_as_a_key_are_refused_at_once(checkpoint_dir):
    """Each tuple contains the previous one twice, so that hashing or printing the last one takes 2^100 steps."""
    doubled = b"".join(b"\x94h" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(100))
    (checkpoint_dir / ".metadata").write_bytes(b"\x80\x04)" + doubled + b"\x94}h" + bytes([100]) + b"Ns.")
    with pytest.raises(UserError, match=r"\.metadata cannot be read .*: a key is of the type tuple"):
        read_metadata(checkpoint_dir / ".metadata")


def test_a_fifo_in_place_of_a_shard_is_refused(checkpoint_dir):
    (checkpoint_dir / "__0_0.distcp").unlink()
    os.mkfifo(checkpoint_dir / "__0_0.distcp")
    with pytest.raises(UserError, match=r"'__0_0\.distcp' is not a regular file"):
        read_tensors(checkpoint_dir, lambda name: True)


def test_a_bare_pickle_in_place_of_metadata_is_not_executed(checkpoint_dir, tmp_path):
    canary = Canary(tmp_path / "canary")
    canary.write(checkpoint_dir / ".metadata", "bare")
    with pytest.raises(UserError, match=r"it refers to '\w+\.mkdir'"):
        read_metadata(checkpoint_dir / ".metadata")
    assert not canary.was_run()
