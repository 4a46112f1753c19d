import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.shards.manifest import Manifest, ShardWriter, load_manifest, load_shards
from gptlab.errors import UserError
from preparing import DiskEvents

DOCUMENTS = [np.random.default_rng(n).integers(0, 60_000, size=1 + n * 7 % 40).astype(np.uint32) for n in range(30)]
TOKENS = np.concatenate(DOCUMENTS)


def write(folder, dtype="uint16", documents_each=4) -> Manifest:
    """Writes DOCUMENTS as train, ``documents_each`` per shard, and the last three of them as val."""
    folder.mkdir(exist_ok=True)
    splits = {"train": [], "val": []}
    for split, documents in (("train", DOCUMENTS), ("val", DOCUMENTS[-3:])):
        for start in range(0, len(documents), documents_each):
            writer = ShardWriter(folder / f"{split}_{start:06d}.bin", dtype)
            for document in documents[start : start + documents_each]:
                writer.add(document, text_bytes=10 * len(document), documents=1)
            splits[split] += writer.finish()
    tokenizer = {"name": "bytes"}
    manifest = Manifest(format=1, origin="here", tokenizer=tokenizer, vocab_size=60_000, dtype=dtype, splits=splits)
    manifest.save(folder)
    return manifest


@pytest.mark.parametrize(("dtype", "on_disk"), [("uint16", "<u2"), ("uint32", "<u4")])
def test_shards_hold_the_documents_in_order_and_match_the_manifest(tmp_path, dtype, on_disk):
    write(tmp_path, dtype)
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert (written["format"], written["dtype"], written["vocab_size"]) == (1, dtype, 60_000)
    shards = written["splits"]["train"]
    assert [shard["file"] for shard in shards] == sorted(path.name for path in tmp_path.glob("train_*.bin"))
    files = [(tmp_path / shard["file"]).read_bytes() for shard in shards]
    np.testing.assert_array_equal(np.frombuffer(b"".join(files), dtype=on_disk), TOKENS)
    assert [shard["sha256"] for shard in shards] == [hashlib.sha256(file).hexdigest() for file in files]
    assert [shard["tokens"] for shard in shards] == [len(file) // np.dtype(on_disk).itemsize for file in files]
    assert [shard["bytes"] for shard in shards] == [10 * shard["tokens"] for shard in shards]
    assert sum(shard["documents"] for shard in shards) == len(DOCUMENTS)


def test_shard_gets_its_final_name_only_when_complete(tmp_path):
    writer = ShardWriter(tmp_path / "train_000003.bin", "uint16")
    writer.add(np.arange(5, dtype=np.uint32), text_bytes=5, documents=0)
    assert not (tmp_path / "train_000003.bin").exists()
    writer.add(np.arange(5, 10, dtype=np.uint32), text_bytes=6, documents=1)
    assert not (tmp_path / "train_000003.bin").exists()
    (shard,) = writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == [shard.file] == ["train_000003.bin"]
    assert (shard.tokens, shard.bytes, shard.documents, shard.offset) == (10, 11, 1, 0)
    assert np.fromfile(tmp_path / "train_000003.bin", "<u2").tolist() == list(range(10))


def test_rewritten_shard_replaces_the_old_one(tmp_path):
    for length in (9, 3):
        writer = ShardWriter(tmp_path / "train_000000.bin", "uint32")
        writer.add(np.arange(length, dtype=np.uint32), text_bytes=1, documents=1)
        writer.finish()
    assert np.fromfile(tmp_path / "train_000000.bin", "<u4").tolist() == [0, 1, 2]


def test_empty_or_abandoned_shard_leaves_no_file(tmp_path):
    assert ShardWriter(tmp_path / "val_000000.bin", "uint16").finish() == []
    writer = ShardWriter(tmp_path / "val_000000.bin", "uint16")
    writer.add(np.arange(5, dtype=np.uint32), text_bytes=5, documents=1)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_shards_and_manifest_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    events = DiskEvents(monkeypatch)
    write(tmp_path)
    for path in tmp_path.iterdir():
        size = path.stat().st_size
        assert events.of(path.stat()) == [("synced", size), ("renamed", size)]
    assert len(list(tmp_path.iterdir())) == 10


def test_fingerprint_depends_on_tokens_and_tokenizer_but_not_on_location(tmp_path):
    manifest = write(tmp_path / "one")
    assert write(tmp_path / "two").fingerprint() == manifest.fingerprint()
    shutil.move(tmp_path / "one", tmp_path / "three")
    assert load_shards(tmp_path / "three").fingerprint() == manifest.fingerprint()
    moved = manifest.model_copy(update={"origin": "elsewhere"})
    assert moved.fingerprint() == manifest.fingerprint()

    train, val = manifest.splits["train"], manifest.splits["val"]
    damaged = [train[0].model_copy(update={"sha256": "0" * 64}), *train[1:]]
    others = [
        {"splits": {"train": damaged, "val": val}},
        {"splits": {"train": train[::-1], "val": val}},
        {"splits": {"train": [*train, *val], "val": []}},
        {"tokenizer": {"name": "characters", "characters": "ab"}},
    ]
    fingerprints = [manifest.model_copy(update=other).fingerprint() for other in others]
    assert len({manifest.fingerprint(), *fingerprints}) == 1 + len(others)


def test_saved_manifest_is_loaded(tmp_path):
    manifest = write(tmp_path)
    assert load_shards(tmp_path) == manifest


@pytest.mark.parametrize("split", ["train", "val"])
def test_truncated_or_missing_shard_is_reported(tmp_path, split):
    shard = write(tmp_path).splits[split][-1]
    path = tmp_path / shard.file
    os.truncate(path, 2 * shard.tokens - 2)
    with pytest.raises(UserError, match=rf"{path} has {path.stat().st_size} bytes, .* {2 * shard.tokens:,} bytes"):
        load_shards(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path} is missing, .* {2 * shard.tokens:,} bytes"):
        load_shards(tmp_path)


def test_missing_or_invalid_manifest_raises(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path} does not contain prepared data: manifest.json is missing"):
        load_manifest(tmp_path)
    for change in ({"format": 2}, {"dtype": "int16"}, {"author": "somebody"}):
        write(tmp_path)
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(
            UserError, match=rf"{path} is not a manifest of format 1: '{next(iter(change))}': [^\n]*\.$"
        ):
            load_manifest(tmp_path)
    path.write_text("no JSON")
    with pytest.raises(UserError, match=r"is not a manifest of format 1: Invalid JSON: [^\n]*\.$"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_manifest_without_one_of_the_splits_raises(tmp_path, missing):
    write(tmp_path)
    path = tmp_path / "manifest.json"
    written = json.loads(path.read_text())
    del written["splits"][missing]
    path.write_text(json.dumps(written))
    with pytest.raises(UserError, match=missing):
        load_shards(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_abandoned_shard_on_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def open_full(path, mode, open_file=Path.open):
        assert mode == "xb"
        path.symlink_to("/dev/full")
        return open_file(path, "wb")

    monkeypatch.setattr(Path, "open", open_full)
    writer = ShardWriter(tmp_path / "train_000000.bin", "uint16")
    writer.add(np.zeros(1000, dtype=np.uint32), text_bytes=1, documents=1)
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
