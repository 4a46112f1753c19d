"""Token shards: raw little-endian uint16 or uint32 files, described by a manifest in the same directory."""

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
LOCK = ".lock"  # suffix of the lock file of a directory, which keeps two processes from preparing it concurrently
SUFFIXES = (".bin", ".npy")  # of token files
FORMAT = 1

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")


class Shard(FrozenConfig):
    """Metadata of one token file.

    Attributes:
        file: File name in the directory of the manifest, or a path to another directory.
        offset: Number of bytes before the tokens.
        tokens: Number of tokens.
        bytes: Number of UTF-8 bytes of the text. End-of-text tokens count as 0 bytes.
        documents: Number of documents that end in this file.
        num_replaced: Number of documents, or parts of documents, in which U+FFFD replaces bytes that are not valid
            UTF-8. Stored as "mended" in JSON.
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
    """Metadata of a directory of shards.

    Attributes:
        format: Version of the manifest format.
        origin: Human-readable origin of the text.
        tokenizer: Record of the tokenizer; see ``gptlab.data.tokenizers.tokenizer``.
        vocab_size: Number of token IDs V.
        dtype: Little-endian dtype of the token files.
        splits: Shards of train and val, in order.
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
            raise ValueError(f"missing splits: {', '.join(missing)}")
        return splits

    def shards(self) -> list[Shard]:
        """Returns all shards, those of train first."""
        return [shard for split in SPLITS for shard in self.splits[split]]

    def file_size(self, shard: Shard) -> int:
        """Returns the size of a shard's file in bytes."""
        return shard.offset + shard.tokens * np.dtype(self.dtype).itemsize

    def tokens(self, split: Split) -> int:
        """Returns the number of tokens of a split."""
        return sum(shard.tokens for shard in self.splits[split])

    def bytes(self, split: Split) -> int:
        """Returns the number of UTF-8 bytes of the text of a split, the denominator of bits per byte."""
        return sum(shard.bytes for shard in self.splits[split])

    def fingerprint(self) -> str:
        """Returns a SHA-256 of the tokens and the tokenizer. It does not depend on the location of the files."""
        hashes = {split: [shard.sha256 for shard in self.splits[split]] for split in SPLITS}
        return hashlib.sha256(json.dumps([self.tokenizer, hashes], sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes manifest.json into ``folder``."""
        write_durably(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of ``folder``. Raises UserError if it is missing or invalid."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} does not contain prepared data: {MANIFEST} is missing.")
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # pydantic's ValidationError, or a UnicodeDecodeError
        raise UserError(f"{path} is not a manifest of format {FORMAT}: {error}") from None


def load_shards(folder: Path) -> Manifest:
    """Reads the manifest of ``folder`` and checks the sizes of its shards.

    Raises:
        UserError: The manifest is missing or invalid, or a shard is missing or has the wrong size.
    """
    manifest = load_manifest(folder)
    for shard in manifest.shards():
        file, expected = folder / shard.file, manifest.file_size(shard)
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(f"{file} {found}, but its manifest requires {expected:,} bytes.")
    return manifest


class ShardWriter:
    """Writes one shard under a temporary name, hashes and syncs it, then renames it.

    Args:
        path: Final path of the file.
        dtype: dtype of the tokens.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype).newbyteorder("<")
        self.tokens = self.bytes = self.documents = self.num_replaced = 0
        self._digest = hashlib.sha256()
        self._unfinished = _temporary_path(path)
        self._file = self._unfinished.open("wb")

    def add(self, ids: NDArray[Any], text_bytes: int, documents: int, num_replaced: int = 0) -> None:
        """Appends tokens.

        Args:
            ids: Token IDs (N,).
            text_bytes: Number of UTF-8 bytes of their text.
            documents: Number of documents that end with them.
            num_replaced: Number of documents in which invalid UTF-8 was replaced.
        """
        data = np.ascontiguousarray(ids, dtype=self.dtype).data
        self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)
        self.bytes += text_bytes
        self.documents += documents
        self.num_replaced += num_replaced

    def finish(self) -> list[Shard]:
        """Closes, syncs and renames the file. Returns the shard in a list, which is empty if there are no tokens."""
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
        with suppress(OSError):  # closing flushes the file, which fails if the disk is full
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
    """Syncs a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_path(path: Path) -> Path:
    """Returns a unique path in the same directory. A process ID is not unique, because containers may share it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
