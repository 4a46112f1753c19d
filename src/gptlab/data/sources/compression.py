"""Decompression of corpus files, within a limit on the decompressed size. Imports no torch."""

import bz2
import gzip
import io
import logging
import lzma
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from gptlab.errors import UserError, failure_reason

log = logging.getLogger(__name__)

Compression = Literal["gzip", "zstd", "bzip2", "xz"]

BLOCK_BYTES = 2**16  # bytes that are read at a time
FRAME_BYTES = 2**10  # bytes that are decompressed at a time; 4 bytes can become 128 KiB (RFC 8878, 3.1.1.2)
MAX_WINDOW_BYTES = 2**31  # zstd --ultra --long=31; memory is used only for what is decompressed
MAX_XZ_BYTES = 2**30  # memory for decompressing .xz; xz -9 needs 65 MiB
MIN_EXPANDED_BYTES = 2**24  # text that any compressed file may have, whatever data.max_expansion
LOGGED_BYTES = 2**32  # decompressed bytes of a file between two log messages


class Expansion:
    """Counts the decompressed bytes of a file.

    Args:
        path: Path of the file.
        compressed: Size in bytes of the file, or of the part of it that is read.
        max_expansion: Maximum ratio; see ``Decoding``.
        minimum: Number of bytes that are always allowed.
    """

    def __init__(self, path: Path, compressed: int, max_expansion: float, minimum: int = MIN_EXPANDED_BYTES) -> None:
        self.path, self.compressed, self.max_expansion = path, compressed, max_expansion
        self.limit = max(minimum, max_expansion * compressed)
        self.expanded, self._logged = 0, LOGGED_BYTES

    def add(self, size: int) -> None:
        """Counts ``size`` more bytes; raises UserError if these are more than allowed."""
        self.expanded += size
        if self.expanded > self.limit:
            raise UserError(
                f"{self.path} expands from {self.compressed:,} to more than {self.limit:,.0f} bytes, so it may be a "
                f"decompression bomb (data.max_expansion={self.max_expansion:g}). If it is not, set "
                "data.max_expansion=<larger ratio>."
            )
        if self.expanded >= self._logged:
            log.info("Decompressing %s: %.1f GB so far", self.path, self.expanded / 1e9)
            self._logged += LOGGED_BYTES


@contextmanager
def open_file(path: Path, compression: Compression | None, max_expansion: float = math.inf) -> Iterator[BinaryIO]:
    """Opens a file and decompresses it.

    Raises:
        UserError: The file is damaged, not compressed in this way, or expands more than ``max_expansion`` allows.
    """
    if compression is None:
        with path.open("rb") as file:
            yield file
        return
    limited = _Limited(_decompress(path, compression), Expansion(path, path.stat().st_size, max_expansion))
    with io.BufferedReader(limited, BLOCK_BYTES) as file, name_damage(path, compression):
        yield file


@contextmanager
def name_damage(path: Path, kind: str) -> Iterator[None]:
    """Raises UserError instead of the errors that libraries raise for a damaged file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (EOFError, zlib.error, lzma.LZMAError, OSError, *_library_errors())):
            raise
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system
            raise
        raise UserError(f"{path} is damaged, or its format is not {kind}: {failure_reason(error)}") from error


def _library_errors() -> list[type[Exception]]:
    """Returns the errors of the libraries that have been imported."""
    names = {"zstandard": "ZstdError", "pyarrow": "ArrowException"}
    return [getattr(sys.modules[module], name) for module, name in names.items() if sys.modules.get(module)]


def _decompress(path: Path, compression: Compression) -> io.RawIOBase | gzip.GzipFile:
    if compression == "gzip":
        return gzip.GzipFile(path)
    if compression == "bzip2":
        return _Frames(path, bz2.BZ2Decompressor)
    if compression == "xz":
        return _Frames(path, lambda: lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES), padding=b"\0")
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"{path} cannot be decompressed, because zstandard is not installed. Install it with: pip install zstandard"
        ) from error
    return _Frames(path, zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj)


class _Frames(io.RawIOBase):
    """Decompressed content of all frames of a file. Raises EOFError if it is truncated.

    Args:
        path: Path of the file.
        begin: Returns the decompressor of a frame.
        padding: Byte that may follow a frame any number of times.
    """

    def __init__(self, path: Path, begin: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._begin, self._text, self._padding = path.open("rb"), begin, memoryview(b""), padding
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            ended = self._frame is None or self._frame.eof
            block = self._frame.unused_data.lstrip(self._padding) if self._frame and ended else b""
            while not block and (read := self._file.read(FRAME_BYTES)):
                block = read.lstrip(self._padding) if self._frame and ended else read
            if not block and ended:
                return 0
            if not block:
                raise EOFError("the last frame is truncated")
            self._frame = self._begin() if ended else self._frame
            self._text = memoryview(self._frame.decompress(block))
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _Limited(io.RawIOBase):
    """Decompressed content of a file, whose size is limited."""

    def __init__(self, file: io.RawIOBase | gzip.GzipFile, expansion: Expansion) -> None:
        self._file, self._expansion = file, expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer) or 0
        self._expansion.add(size)
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
