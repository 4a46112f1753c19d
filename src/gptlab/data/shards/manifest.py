"""Token shards: raw little-endian uint16 or uint32 files, described by a manifest beside them."""

import hashlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, NonNegativeInt, field_validator

from gptlab.config.base import FrozenConfig
from gptlab.errors import UserError

MANIFEST = "manifest.json"
LOCK = ".lock"  # the file beside a prepared folder that keeps two processes from making it at once
SUFFIXES = (".bin", ".npy")  # of files of tokens
FORMAT = 1

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")


class Shard(FrozenConfig):
    """File of tokens.

    Attributes:
        file: Name in the folder, or path elsewhere.
        offset: Bytes before the tokens.
        tokens: Number of tokens.
        bytes: UTF-8 bytes of their text; the end of text has none.
        documents: Number of documents that end here.
        num_replaced: Documents, or parts of them, in which U+FFFD replaces bytes that are not UTF-8; "mended" in JSON.
        sha256: SHA-256 of the tokens.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    file: str
    offset: NonNegativeInt = 0
    tokens: NonNegativeInt
    bytes: NonNegativeInt
    documents: NonNegativeInt
    num_replaced: NonNegativeInt = Field(default=0, alias="mended")
    sha256: str


class Manifest(FrozenConfig):
    """Description of a folder of shards.

    Attributes:
        format: Version of this layout.
        origin: Where the text came from, for people.
        tokenizer: The tokenizer's record; see ``gptlab.data.tokenizers.tokenizer``.
        vocab_size: Number of ids V.
        dtype: Of the files, little-endian.
        splits: The shards of train and val, in order.
    """

    format: Literal[1]
    origin: str
    tokenizer: dict[str, Any]
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, list[Shard]]

    @field_validator("splits")
    @classmethod
    def _both_splits(cls, splits: dict[Split, list[Shard]]) -> dict[Split, list[Shard]]:
        if missing := [split for split in SPLITS if split not in splits]:
            raise ValueError(f"there is no {' and no '.join(missing)}")
        return splits

    def shards(self) -> list[Shard]:
        """All shards, those of train first."""
        return [shard for split in SPLITS for shard in self.splits[split]]

    def file_size(self, shard: Shard) -> int:
        """Bytes of a shard's file."""
        return shard.offset + shard.tokens * np.dtype(self.dtype).itemsize

    def tokens(self, split: Split) -> int:
        """Returns the number of tokens of a split."""
        return sum(shard.tokens for shard in self.splits[split])

    def bytes(self, split: Split) -> int:
        """Returns the UTF-8 bytes of the text of a split, the denominator of bits per byte."""
        return sum(shard.bytes for shard in self.splits[split])

    def fingerprint(self) -> str:
        """A hash of the tokens and what they mean; where the files lie does not matter."""
        hashes = {split: [shard.sha256 for shard in self.splits[split]] for split in SPLITS}
        return hashlib.sha256(json.dumps([self.tokenizer, hashes], sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes manifest.json into ``folder``."""
        write_durably(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of ``folder``; raises UserError if there is none, or it is invalid."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} holds no prepared data: there is no {MANIFEST} in it.")
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # pydantic's own, or that it is no text
        raise UserError(f"{path} is not a manifest of format {FORMAT}: {error}") from None


def load_shards(folder: Path) -> Manifest:
    """Reads the manifest of ``folder`` and checks the size of its shards; raises UserError for the first wrong one."""
    manifest = load_manifest(folder)
    for shard in manifest.shards():
        file, expected = folder / shard.file, manifest.file_size(shard)
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size:,}"
            raise UserError(f"{file} should have {expected:,} bytes and {found}.")
    return manifest


class ShardWriter:
    """Writes one shard under a temporary name, hashes and syncs it, then renames it.

    Args:
        path: Final name.
        dtype: Of the tokens.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype).newbyteorder("<")
        self.tokens = self.bytes = self.documents = self.num_replaced = 0
        self._digest = hashlib.sha256()
        self._unfinished = _temporary_path(path)
        self._file = self._unfinished.open("wb")

    def add(self, ids: NDArray[Any], text_bytes: int, documents: int, num_replaced: int = 0) -> None:
        """Appends ``ids``, the tokens of ``text_bytes`` bytes of UTF-8, which end ``documents`` documents."""
        data = np.ascontiguousarray(ids, dtype=self.dtype).data
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)
        self.bytes += text_bytes
        self.documents += documents
        self.num_replaced += num_replaced

    def finish(self) -> list[Shard]:
        """Closes, syncs and renames the file; returns the shard, or nothing if it has no tokens."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not self.tokens:
            self._unfinished.unlink()
            return []
        self._unfinished.replace(self.path)
        shard = Shard(
            file=self.path.name,
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.documents,
            num_replaced=self.num_replaced,
            sha256=self._digest.hexdigest(),
        )
        return [shard]

    def abandon(self) -> None:
        """Deletes the unfinished file."""
        self._unfinished.unlink(missing_ok=True)
        with suppress(OSError):  # of a full disk, which would be written to once more
            self._file.close()


def write_durably(path: Path, text: str) -> None:
    """Writes a small file atomically and syncs it."""
    unfinished = _temporary_path(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def fsync_path(path: Path) -> None:
    """Syncs a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_path(path: Path) -> Path:
    """Returns a unique name beside ``path``; a process id would not do, as containers may share it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
