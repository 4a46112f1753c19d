"""Sharded checkpoints: safetensors files and a JSON index, which are checked before they are used."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import sharding
from gptlab.errors import UserError
from gptlab.training.checkpoints import shards, writing
from gptlab.training.checkpoints.reading import read_checkpoint
from gptlab.training.checkpoints.shards import read_tensors, save_shards

NAME = "model.wte.weight"
FILE = "shard_00000.safetensors"
TENSORS = {
    NAME: torch.arange(6.0).reshape(3, 2),
    "model.tied": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "model.half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "model.empty": torch.ones(0, 3),
    "optimizer.0.wte.weight.step": torch.tensor(7.0),
    "optimizer.0.wte.weight.count": torch.tensor([2**40, -1]),
}


@pytest.fixture
def checkpoint_dir(tmp_path) -> Path:
    """A sharded checkpoint of one rank."""
    checkpoint_dir = tmp_path / "step_000001"
    checkpoint_dir.mkdir()
    save_shards(TENSORS, checkpoint_dir, 0)
    state = {"global_step": 1, "callbacks": {}, "optimizer_states": [{"param_groups": []}]}
    torch.save(state, checkpoint_dir / "state.pt")
    return checkpoint_dir


def read_all(checkpoint_dir: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoint_dir, lambda name: True)


def test_read_tensors_equal_the_written_ones(checkpoint_dir):
    found = read_all(checkpoint_dir)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read_tensors(checkpoint_dir, lambda name: name.endswith(".step")).keys() == {"optimizer.0.wte.weight.step"}
    assert torch.equal(read_checkpoint(checkpoint_dir)["state_dict"]["wte.weight"], TENSORS[NAME])


def test_the_safetensors_library_reads_a_shard(checkpoint_dir):
    found = load_file(checkpoint_dir / FILE)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.slow
def test_shards_of_any_layout_are_loaded_into_any_other(tmp_path):
    """Runs helpers/sharding.py on 1, 2 and 4 processes; each reads what all of those before it wrote."""
    for processes in (1, 2, 4, 2):
        command = (sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", sharding.__file__)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run((*command, tmp_path), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == (1 + 3 + 3) + (
        1 + 2 + 2
    )  # on 1, 2 and 4 processes, in the format of today and the earlier one
    for checkpoint_dir in tmp_path.iterdir():
        found = read_all(checkpoint_dir)
        assert found.keys() == sharding.TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in sharding.TENSORS.items()), checkpoint_dir.name


def test_a_full_disk_is_recognized_while_shards_are_written(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "write_safetensors", fail)
    with pytest.raises(CheckpointException) as caught:
        save_shards(TENSORS, tmp_path, 0)
    assert writing._is_full(caught.value)


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    ("chunks", "complete"),
    [
        ([chunk((0, 0), (4, 6))], True),
        ([chunk((0, 0), (3, 6)), chunk((3, 0), (1, 6)), chunk((4, 0), (0, 6))], True),
        ([chunk((row, col), (2, 3)) for row in (0, 2) for col in (0, 3)], True),
        ([chunk((row, col), (2, 3)) for row in (0, 2) for col in (0, 3)][:3], False),
        ([chunk((0, 0), (3, 6)), chunk((2, 0), (1, 6))], False),  # overlap and gap
        ([chunk((0, 0), (2, 6)), chunk((0, 0), (2, 6))], False),
        ([chunk((1, 0), (4, 6))], False),
        ([chunk((0, 0), (4, 7))], False),
        ([chunk((0,), (24,))], False),
        ([], False),
    ],
)
def test_shards_must_store_each_element_once(chunks, complete):
    assert shards._is_grid(torch.Size((4, 6)), chunks) == complete


def change_index(checkpoint_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((checkpoint_dir / "shards.json").read_text())
    change(index)
    (checkpoint_dir / "shards.json").write_text(json.dumps(index))


INDEXES = {
    "a file in another directory": (
        lambda t: t[NAME].update(offsets={f"../x/{FILE}": [0, 0]}),
        "'../x/.* not a file in the directory",
    ),
    "an absolute path": (lambda t: t[NAME].update(offsets={"/dev/zero": [0, 0]}), "'/dev/zero' is not a file in"),
    "no name": (lambda t: t[NAME].update(offsets={"": [0, 0]}), "'' is not a file in"),
    "the parent": (lambda t: t[NAME].update(offsets={"..": [0, 0]}), "'..' is not a file in"),
    "a missing file": (lambda t: t[NAME].update(offsets={"b": [0, 0]}), "'b': no such file"),
    "another file": (lambda t: t[NAME].update(offsets={"state.pt": [0, 0]}), "'state.pt' is damaged"),
    "no shards": (lambda t: t[NAME].update(offsets={}), f"'{NAME}'"),
    "a larger shape": (lambda t: t[NAME].update(shape=[2**35, 2]), f"'{NAME}' do not store each of its elements once"),
    "a smaller shape": (lambda t: t[NAME].update(shape=[2, 2]), f"'{NAME}' do not store each of its elements once"),
    "another number of dimensions": (lambda t: t[NAME].update(shape=[6]), "each of its elements once"),
    "a moved shard": (lambda t: t[NAME].update(offsets={FILE: [1, 0]}), "each of its elements once"),
    "a negative offset": (lambda t: t[NAME].update(offsets={FILE: [-1, 0]}), "greater than or equal to 0"),
    "a huge size": (lambda t: t[NAME].update(shape=[2**50, 2]), "less than or equal to"),
    "huge empty sizes": (lambda t: t["model.empty"].update(shape=[0, 2**40, 2**40]), "each of its elements once"),
    "many dimensions": (lambda t: t[NAME].update(shape=[1] * 1000), "at most 8 items"),
    "text": (lambda t: t[NAME].update(shape="3"), "valid array"),
    "an unknown key": (lambda t: t[NAME].update(code="x"), "Extra inputs"),
    "a tensor that is not stored": (lambda t: t.update(b=t[NAME]), "only one of .* and the index has 'b'"),
    "an omitted tensor": (lambda t: t.pop(NAME), f"only one of .* and the index has '{NAME}'"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_invalid_index_is_refused(checkpoint_dir, kind):
    change, reason = INDEXES[kind]
    change_index(checkpoint_dir, lambda index: change(index["tensors"]))
    with pytest.raises(UserError, match=rf"shards\.json cannot be read as [^\n]*{reason}[^\n]*\.$"):
        read_all(checkpoint_dir)


def test_an_index_of_another_format_is_refused(checkpoint_dir):
    change_index(checkpoint_dir, lambda index: index.update(format=2))
    with pytest.raises(UserError, match=r"shards\.json .* 'format'"):
        read_all(checkpoint_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'{"format": 1}', b" " * 2001])
def test_an_index_that_is_not_its_json_is_refused(checkpoint_dir, monkeypatch, content):
    monkeypatch.setattr(shards, "MAX_INDEX_BYTES", 2000 if content.isspace() else 10**8)
    (checkpoint_dir / "shards.json").write_bytes(content)
    with pytest.raises(UserError, match=r"shards\.json cannot be read as the index of shards: [^\n]*$"):
        read_all(checkpoint_dir)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def damage_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"', 1))


def enlarge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def replace_with_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_with_link(path: Path) -> None:
    path.rename(path.with_name("b"))
    path.symlink_to("b")


@pytest.mark.parametrize(
    "damage", [cut, append, damage_header, enlarge_header, replace_with_fifo, replace_with_link, Path.unlink]
)
@pytest.mark.parametrize("load", [read_all, lambda path: shards.load_shards(path, {NAME: torch.ones(3, 2)})])
def test_a_damaged_shard_is_refused_by_name(checkpoint_dir, damage, load):
    damage(checkpoint_dir / FILE)
    with pytest.raises(UserError, match=rf"shards\.json cannot be read as the index of shards: '{FILE}'[^\n]*\.$"):
        load(checkpoint_dir)


def test_shards_of_different_dtypes_are_refused(checkpoint_dir):
    save_file({NAME: torch.ones(1, 2).half()}, checkpoint_dir / "b")
    parts = {FILE: [0, 0], "b": [3, 0]}
    change_index(checkpoint_dir, lambda index: index["tensors"][NAME].update(shape=[4, 2], offsets=parts))
    with pytest.raises(UserError, match=f"'{NAME}' is stored in 2 dtypes"):
        read_all(checkpoint_dir)


@pytest.mark.parametrize("tensors", [{NAME: torch.ones(2, 2)}, {"model.other": torch.ones(1)}])
def test_tensors_that_a_checkpoint_does_not_have_raise(checkpoint_dir, tensors):
    with pytest.raises(UserError, match=f"shards of .* cannot be read: .*{next(iter(tensors))}"):
        shards.load_shards(checkpoint_dir, tensors)


def test_optimizer_tensors_without_an_optimizer_raise(checkpoint_dir):
    state = torch.load(checkpoint_dir / "state.pt", weights_only=True)
    torch.save(state | {"optimizer_states": []}, checkpoint_dir / "state.pt")
    with pytest.raises(UserError, match=r"shards of .* do not match its state\.pt"):
        read_checkpoint(checkpoint_dir)
