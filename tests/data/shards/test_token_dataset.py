"""Verification of shards, and statistics of prepared data compared with known values."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.order import BatchSizeSchedule, WindowOrder
from gptlab.data.shards import token_dataset
from gptlab.data.shards.formats import build_manifest
from gptlab.data.shards.open_shards import open_shards
from gptlab.data.shards.streams import LocalFolder
from gptlab.data.shards.token_dataset import (
    TokenDataset,
    batch_texts,
    check_unchanged,
    first_documents,
    longest_document,
    verify_shards,
)
from gptlab.data.tokenizers.tokenizer import BytesTokenizer
from gptlab.errors import UserError
from permissions import file_permissions
from preparing import data_config, prepare_text, tokenizer_config, write_shards

PIECES = [np.random.default_rng(n).integers(0, 60_000, size=50) for n in range(4)]
NAMES = ["train_000000.bin", "train_000001.bin", "train_000002.bin", "val_000000.bin"]


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are hashed, in this order."""
    names = []

    def hash_file(file, advance, hash_file=token_dataset.hash_file):
        names.append(os.path.basename(file.name))  # noqa: PTH119  (a string)
        return hash_file(file, advance)

    monkeypatch.setattr(token_dataset, "hash_file", hash_file)
    return names


class Audit:
    """Calls ``hook`` for each audit event of Python, such as the opening of a file; hooks cannot be removed."""

    def __init__(self) -> None:
        self.hook = lambda event, arguments: None
        sys.addaudithook(lambda event, arguments: self.hook(event, arguments))


audit = Audit()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shards"


@pytest.fixture
def check(tmp_path, folder):
    """Function that checks the shards against their original manifest, with one cache."""
    manifest = write_shards(folder, PIECES[:3], val=PIECES[3:], header=b"head")
    return lambda: check_unchanged(folder, manifest, tmp_path / "cache")


def flip(path, place=7) -> tuple[str, str]:
    """Flips a bit and returns the hashes of the tokens before and after."""
    data = bytearray(path.read_bytes())
    before = hashlib.sha256(data[4:]).hexdigest()
    data[place] ^= 0x10
    path.write_bytes(data)
    return before, hashlib.sha256(data[4:]).hexdigest()


def damaged(path, before: str, after: str):
    return pytest.raises(
        UserError, match=rf"^{re.escape(str(path))} has changed .* SHA-256 is {after}, not {before}\.$"
    )


def test_verify_shards_hashes_every_shard_and_reports_the_first_damaged_one(folder, hashed):
    manifest = write_shards(folder, PIECES[:3], val=PIECES[3:], header=b"head")
    assert verify_shards(LocalFolder(folder), manifest) == 4
    assert hashed == NAMES
    flip(folder / NAMES[0], place=3)  # in the header, which is not hashed
    flip(folder / NAMES[3], place=-1)
    hashes = flip(folder / NAMES[2], place=4)
    with damaged(folder / NAMES[2], *hashes):
        verify_shards(LocalFolder(folder), manifest)


def test_unmodified_shards_are_hashed_once(check, folder, hashed):
    check()
    assert hashed == NAMES
    for path in folder.iterdir():
        path.read_bytes()
    check()
    assert hashed == NAMES
    os.utime(folder / NAMES[1])
    for _ in range(2):
        check()
    assert hashed == [*NAMES, NAMES[1]]


def test_shards_that_were_verified_are_not_opened_at_the_next_start(tmp_path, monkeypatch):
    for name, tokens in zip(NAMES, PIECES, strict=True):
        (tokens % 256).astype("<u2").tofile(tmp_path / name)
    shards = data_config(corpus="shards", path=f"{tmp_path}/*.bin", cache_dir=str(tmp_path / "cache"))
    first = open_shards(shards, tokenizer_config("bytes"))
    opened: list[str] = []

    def record(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).endswith(".bin"):
            opened.append(Path(arguments[0]).name)

    monkeypatch.setattr(audit, "hook", record)
    assert open_shards(shards, tokenizer_config("bytes")).manifest == first.manifest
    assert opened == []
    os.utime(first.folder / first.manifest.shards()[1].file)  # another listing: the file is read, and so are all
    open_shards(shards, tokenizer_config("bytes"))
    assert set(opened) == set(NAMES)


def test_directories_are_recorded_separately(check, folder, hashed, tmp_path):
    check()
    manifest = write_shards(tmp_path / "other", PIECES[:1])
    check_unchanged(tmp_path / "other", manifest, tmp_path / "cache")
    check()
    assert hashed == [*NAMES, NAMES[0]]


def test_flipped_bit_is_reported_until_it_is_restored(check, folder):
    check()
    before, after = flip(folder / NAMES[1])
    for _ in range(2):
        with damaged(folder / NAMES[1], before, after):
            check()
    flip(folder / NAMES[1])
    check()


def test_shard_damaged_before_first_use_is_reported(check, folder):
    with damaged(folder / NAMES[3], *flip(folder / NAMES[3], place=-1)):
        check()


def test_swapped_shards_are_reported(check, folder):
    check()
    one, other = folder / NAMES[0], folder / NAMES[1]
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    hashes = [hashlib.sha256(path.read_bytes()[4:]).hexdigest() for path in (other, one)]
    with damaged(one, *hashes):
        check()


def test_replaced_file_of_same_size_and_time_is_reported(check, folder):
    check()
    path, was = folder / NAMES[2], (folder / NAMES[2]).stat()
    (folder / "new").write_bytes(path.read_bytes())
    hashes = flip(folder / "new")
    os.utime(folder / "new", ns=(was.st_atime_ns, was.st_mtime_ns))
    (folder / "new").rename(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    with damaged(path, *hashes):
        check()


def test_changed_manifest_of_the_same_files_is_verified_again(check, folder, tmp_path):
    check()
    path = folder / "manifest.json"
    right = hashlib.sha256((folder / NAMES[0]).read_bytes()[4:]).hexdigest()
    changed = json.loads(path.read_text().replace(right, "0" * 64))
    manifest = write_shards(tmp_path / "other", PIECES[:1]).model_validate(changed)
    with damaged(folder / NAMES[0], "0" * 64, right):
        check_unchanged(folder, manifest, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b'{"train_000000.bin": 3}'])
def test_invalid_record_of_verified_files_is_ignored(check, hashed, tmp_path, content):
    check()
    (memory,) = (tmp_path / "cache" / "verified").glob("*.json")
    memory.write_bytes(content)
    for _ in range(2):
        check()
    assert hashed == [*NAMES, *NAMES]


DOCUMENTS = ["short", "the longest document of them all", "", "middling text"]


@pytest.fixture
def prepared(tmp_path) -> TokenDataset:
    ids = [i for text in DOCUMENTS for i in (*text.encode(), 256)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(np.array(ids, dtype="<u2").tobytes())
    manifest = build_manifest([tmp_path / "train.bin", tmp_path / "val.bin"], BytesTokenizer())
    return TokenDataset(LocalFolder(tmp_path), manifest, BytesTokenizer())


@pytest.mark.parametrize("chunk", [1, 7, 33, 10**6])
def test_longest_document_does_not_depend_on_chunk_size(prepared, monkeypatch, chunk):
    monkeypatch.setattr(token_dataset, "CHUNK", chunk)
    stream = prepared.stream("train")
    assert longest_document(stream, 256) == len(DOCUMENTS[1])
    assert longest_document(stream, None) == len(stream)


def test_first_documents_are_decoded_and_truncated(prepared):
    assert first_documents(prepared, "train", documents=2, tokens=11) == ["short", "the longest"]
    assert first_documents(prepared, "val", documents=9, tokens=99) == [text for text in DOCUMENTS if text]


@pytest.mark.parametrize("place", [0, 10, -1])
def test_flipped_bit_is_reported_with_its_shard(prepared, place):
    assert verify_shards(prepared.store, prepared.manifest) == 2
    path = prepared.folder / "val.bin"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"val\.bin has changed"):
        verify_shards(prepared.store, prepared.manifest)


def test_batch_texts_match_the_training_order(prepared):
    order = WindowOrder([prepared.manifest.tokens("train")], 4, 1, "data", "shuffled", 1, None)
    ids = prepared.stream("train").read([0], prepared.manifest.tokens("train"))[0]
    starts = order.starts(np.arange(6, 9))  # step 3 of batches of three
    expected = [(int(start), BytesTokenizer().decode(ids[start : start + 5].tolist())) for start in starts]
    assert batch_texts(prepared, order, step=3, stages=BatchSizeSchedule(3)) == expected


@pytest.fixture
def read_only(tmp_path):
    """Returns a function that makes a directory read-only, with all directories and files in it."""
    made = []

    def make(folder: Path) -> None:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
            made.append(path)

    with file_permissions():
        yield make
        for path in made:
            path.chmod(0o755)


@pytest.mark.parametrize("is_verified", [True, False])
def test_prepared_data_in_a_read_only_cache_is_used(tmp_path, read_only, is_verified):
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text("a bad cab, a cad\n" * 50)
    mine = prepare_text(text)
    if not is_verified:
        shutil.rmtree(cache / "verified")
    before = sorted(cache.rglob("*"))
    read_only(cache)
    with pytest.raises(PermissionError):
        (cache / "file").touch()
    theirs = prepare_text(text)
    assert theirs.manifest == mine.manifest
    assert theirs.stream("train").read([0], 20).tolist() == mine.stream("train").read([0], 20).tolist()
    shards = data_config(corpus="shards", path=str(theirs.folder), cache_dir=str(cache))
    assert open_shards(shards, tokenizer_config("bytes")).manifest == mine.manifest
    assert sorted(cache.rglob("*")) == before
    with pytest.raises(UserError, match=r"cache is read-only, and \S+text\.txt has not been prepared in it"):
        prepare_text(text, val_fraction=0.2)
    np.arange(99, dtype=np.uint16).tofile(tmp_path / "train.bin")
    other = data_config(corpus="shards", path=str(tmp_path / "train.bin"), cache_dir=str(cache))
    with pytest.raises(UserError, match=r"manifest of \S+ cannot be written"):
        open_shards(other, tokenizer_config("bytes"))
