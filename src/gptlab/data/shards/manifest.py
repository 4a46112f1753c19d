"""Token shards: raw little-endian uint16 or uint32 files, described by a manifest in the same directory."""

import hashlib
import json
import os
from collections.abc import Collection
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, NonNegativeInt, field_validator

from gptlab.config.base import FrozenConfig
from gptlab.errors import UserError, failure_reason
from gptlab.files import is_plain_name, open_regular, read_regular, stat_regular, temporary_path, write_durably

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
    try:
        return Manifest.model_validate_json(read_regular(path))
    except FileNotFoundError:
        raise UserError(f"{folder} does not contain prepared data: {MANIFEST} is missing.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {failure_reason(error)}.") from None
    except ValueError as error:  # pydantic's ValidationError, or a UnicodeDecodeError
        raise UserError(f"{path} is not a manifest of format {FORMAT}: {failure_reason(error)}.") from None


def load_shards(folder: Path, described: Collection[Path] = ()) -> Manifest:
    """Reads the manifest of ``folder`` and checks the names and sizes of its shards.

    Args:
        folder: Directory of the manifest.
        described: Token files in another directory that the manifest describes; it may name no other file elsewhere.

    Raises:
        UserError: The manifest is missing or invalid; or a shard is missing, has the wrong size, is a link or no
            regular file, or is in another directory.
    """
    manifest = load_manifest(folder)
    allowed = {str(path.absolute()) for path in described}
    for shard in manifest.shards():
        if shard.file not in allowed and not is_plain_name(shard.file):
            raise UserError(
                f"{folder / MANIFEST} names {shard.file!r:.200}, which is not a file in the same directory."
            )
        expected = manifest.file_size(shard)
        try:
            size = stat_shard(folder, shard).st_size
            found = f"has {size:,} bytes" if size != expected else None
        except OSError as error:
            found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        if found:
            raise UserError(f"{folder / shard.file} {found}, but its manifest requires {expected:,} bytes.")
    return manifest


def stat_shard(folder: Path, shard: Shard) -> os.stat_result:
    """Returns the status of the file of a shard. The same files are refused as by ``open_shard``."""
    return stat_regular(os.path.join(folder, shard.file), follow=not is_plain_name(shard.file))  # noqa: PTH118  (fast)


def open_shard(folder: Path, shard: Shard) -> FileIO:
    """Opens the file of a shard. Only a token file of another program, in another directory, may be a link."""
    return open_regular(folder / shard.file, follow=not is_plain_name(shard.file))


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
        self._unfinished = temporary_path(path)
        self._file = self._unfinished.open("xb")

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
