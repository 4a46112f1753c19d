"""Readers of file formats: splits a file into independent spans and reads the documents of a span.

The result does not depend on the spans. The names of documents do not depend on them, and a text that is too large for
one span is split only where the pre-tokenization of GPT-2 also splits it.
"""

import gzip
import io
import json
import logging
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from gptlab.data.tokenizers.text import replace_surrogates
from gptlab.errors import UserError

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**16  # bytes that are read at a time when searching for an offset at which to split
FRAME_BYTES = 2**10  # bytes of .zst that are decompressed at a time; 4 bytes can become 128 KiB (RFC 8878, 3.1.1.2)
PARQUET_ROWS = 16  # rows that are decoded at a time; a few bytes can repeat a long text in each row
MIN_EXPANDED_BYTES = 2**24  # text that any compressed file may have, whatever data.max_expansion
LOGGED_BYTES = 2**32  # decompressed bytes of a file between two log messages
MAX_CHARACTER_BYTES = 4  # of a character in UTF-8

# A character that is not whitespace (one to four bytes in UTF-8), followed by whitespace. GPT-2's pattern never matches
# across this boundary and has no lookbehind, so both sides are tokenized as in the whole text.
CUT = re.compile(
    rb"(?:[!-~]"
    rb"|[\xc3-\xdf][\x80-\xbf]"  # U+0085 and U+00A0 begin with C2
    rb"|(?:(?!\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)[\xe1-\xef])[\x80-\xbf]{2}"
    rb"|[\xf0-\xf4][\x80-\xbf]{3})(?=[ \t\r\n])"
)


class Document(NamedTuple):
    """Document, or a part of one. Its name does not depend on the location of the corpus.

    Attributes:
        name: Name of the whole document.
        text: Text of this part.
        begin: Start of the part as a fraction of the document: 0 for a whole document.
        end: End of the part as a fraction of the document: 1 for a whole document.
        has_replacements: Whether U+FFFD replaces bytes that are not valid UTF-8.
    """

    name: str
    text: str
    begin: float = 0.0
    end: float = 1.0
    has_replacements: bool = False


class Span(NamedTuple):
    """Range of bytes of a file, or of row groups of a parquet file, and its approximate size in bytes."""

    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class Decoding:
    """Options for reading text. Its repr is part of the fingerprint of a corpus.

    Attributes:
        column: Column or field of a record that holds the text (jsonl, parquet).
        undecodable: Handling of bytes that are not valid UTF-8: "replace" inserts U+FFFD, "refuse" raises an error.
        part_bytes: Size in bytes of the parts in which a compressed text is read.
        max_expansion: Maximum ratio of the decompressed to the compressed size of a file. Not part of the fingerprint,
            because it does not change the text.
    """

    column: str | None
    undecodable: Literal["replace", "refuse"]
    part_bytes: int
    max_expansion: float = field(default=math.inf, repr=False)


def split_spans(path: Path, size: int) -> Iterator[Span]:
    """Splits a file into spans of about ``size`` bytes, deterministically."""
    kind, length = file_kind(path), path.stat().st_size
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_metadata(path)
        except pa.ArrowException as error:
            raise UserError(f"{path} is damaged or not a parquet file: {error}") from error
        for group in range(metadata.num_row_groups):
            yield Span(group, group + 1, metadata.row_group(group).total_byte_size)
    elif _is_compressed(path) or length <= size:
        yield Span(0, length, length)
    else:
        cuts = [0]
        while cuts[-1] < length:
            wanted = cuts[-1] + size
            cuts.append(_next_cut(path, wanted, kind) if wanted < length else length)
        yield from (Span(start, stop, stop - start) for start, stop in pairwise(cuts))


def read_documents(path: Path, name: str, span: Span, decoding: Decoding) -> Iterator[Document]:
    """Yields the documents of one span.

    Args:
        path: Path of the file.
        name: Name of the file in the names of its documents.
        span: Span from ``split_spans``.
        decoding: Options for reading text.

    Raises:
        UserError: The file is damaged, lacks the column, is not valid UTF-8 with ``undecodable="refuse"``, or expands
            more than ``max_expansion`` allows. The message names the file and the position.
    """
    try:
        match file_kind(path):
            case "parquet":
                yield from _read_parquet(path, name, span, decoding)
            case "jsonl":
                yield from _read_jsonl(path, name, span, decoding)
            case _ if _is_compressed(path):
                yield from _read_compressed_text(path, name, decoding)
            case _:
                yield _read_text(path, name, span, decoding)
    except _corruption_errors() as error:
        raise UserError(f"{path} is damaged or not in the format that its file name indicates: {error}") from error


def file_kind(path: Path) -> str:
    """Returns the format of a file from its name: "parquet", "jsonl" or "text", compressed or not."""
    suffix = Path(path.stem).suffix if _is_compressed(path) else path.suffix
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix, "text")


class _Frames(io.RawIOBase):
    """Decompressed content of all frames of a .zst file. Unlike zstandard, raises EOFError if it is truncated."""

    def __init__(self, path: Path, begin: Callable[[], Any]) -> None:
        self._file, self._begin, self._text = path.open("rb"), begin, memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            ended = self._frame is None or self._frame.eof
            block = (self._frame.unused_data if self._frame and ended else b"") or self._file.read(FRAME_BYTES)
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


class _Expansion:
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


class _Decompressed(io.RawIOBase):
    """Decompressed content of a file, whose size is limited."""

    def __init__(self, file: io.RawIOBase | gzip.GzipFile, expansion: _Expansion) -> None:
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


def _corruption_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that the imported libraries raise for a damaged file."""
    names = {"zstandard": "ZstdError", "pyarrow": "ArrowException"}
    found = [getattr(sys.modules[module], name) for module, name in names.items() if sys.modules.get(module)]
    return (EOFError, gzip.BadGzipFile, zlib.error, *found)


def _is_compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".zst")


def _open(path: Path, max_expansion: float) -> BinaryIO:
    """Opens a file and decompresses it according to its suffix."""
    if not _is_compressed(path):
        return path.open("rb")
    file: io.RawIOBase | gzip.GzipFile
    if path.suffix == ".gz":
        file = gzip.GzipFile(path)
    else:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{path} cannot be decompressed, because zstandard is not installed. Install it with: "
                "pip install zstandard"
            ) from error
        file = _Frames(path, zstandard.ZstdDecompressor().decompressobj)
    return io.BufferedReader(_Decompressed(file, _Expansion(path, path.stat().st_size, max_expansion)), BLOCK_BYTES)


def _next_cut(path: Path, wanted: int, kind: str) -> int:
    """Returns the first offset >= ``wanted`` at which a file can be split: after a line, or before whitespace."""
    pattern = re.compile(rb"\n") if kind == "jsonl" else CUT
    with path.open("rb") as file:
        offset, tail = max(wanted - MAX_CHARACTER_BYTES, 0), b""  # start of the character that ends at wanted, at most
        file.seek(offset)
        while block := file.read(BLOCK_BYTES):
            begin = offset - len(tail)
            for found in pattern.finditer(tail + block):
                if begin + found.end() >= wanted:
                    return begin + found.end()
            offset, tail = offset + len(block), (tail + block)[-MAX_CHARACTER_BYTES:]
    return path.stat().st_size


def _decode(data: bytes, decoding: Decoding, where: str, start: int = 0) -> tuple[str, bool]:
    """Decodes UTF-8 and returns the text and whether bytes were replaced. ``start`` is the offset of ``data``."""
    try:
        return data.decode(), False
    except UnicodeDecodeError as error:
        if decoding.undecodable == "replace":
            return data.decode(errors="replace"), True
        raise UserError(
            f"{where} is not UTF-8 at byte {start + error.start}: {data[error.start : error.start + 8]!r}. "
            "data.undecodable=replace replaces such bytes with U+FFFD."
        ) from error


def _read_text(path: Path, name: str, span: Span, decoding: Decoding) -> Document:
    length = max(path.stat().st_size, 1)
    with path.open("rb") as plain:
        plain.seek(span.start)
        text, replaced = _decode(plain.read(span.stop - span.start), decoding, str(path), span.start)
    return Document(name, text, span.start / length, span.stop / length if span.stop else 1.0, replaced)


def _read_compressed_text(path: Path, name: str, decoding: Decoding) -> Iterator[Document]:
    """Reads a compressed text in the parts into which ``split_spans`` would split the decompressed file."""
    with _open(path, decoding.max_expansion) as file:
        length = sum(map(len, iter(lambda: file.read(BLOCK_BYTES), b"")))  # headers do not reliably have the length
    with _open(path, decoding.max_expansion) as file:
        start = 0
        for data in _split_parts(file, decoding.part_bytes):
            stop = start + len(data)
            text, replaced = _decode(data, decoding, str(path), start)
            yield Document(name, text, start / max(length, 1), stop / length if length else 1.0, replaced)
            start = stop


def _split_parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields parts of about ``size`` bytes, split as in ``split_spans``. An empty file is one part."""
    held, ended = bytearray(), False
    while not ended:
        begin, cut = max(size - MAX_CHARACTER_BYTES, 0), None
        while not ended:
            cut = next((found.end() for found in CUT.finditer(held, begin) if found.end() >= size), None)
            if cut is not None:
                break
            begin = max(begin, len(held) - MAX_CHARACTER_BYTES)  # the last character may continue in the next block
            block = file.read(max(BLOCK_BYTES, size - len(held)))
            held += block
            ended = not block
        yield bytes(held[:cut])  # all of it if cut is None
        del held[:cut]


def _read_jsonl(path: Path, name: str, span: Span, decoding: Decoding) -> Iterator[Document]:
    """Reads one JSON object per line. A document is named by the offset of its line in the decompressed file."""
    with _open(path, decoding.max_expansion) as file:
        if span.start:
            file.seek(span.start)
        offset, stop = span.start, sys.maxsize if _is_compressed(path) else span.stop
        while offset < stop:
            line = file.readline()
            if not line:
                return
            where = f"{path}, line at byte {offset}"
            if line.strip():
                try:
                    content, replaced = _decode(line, decoding, where)
                    record = json.loads(content)
                except (ValueError, RecursionError) as error:  # not JSON, or nested too deeply
                    raise UserError(f"{where} is not JSON: {error}.") from error
                text = record.get(decoding.column) if isinstance(record, dict) else None
                columns = list(record) if isinstance(record, dict) else []
                if (checked := check_text(text, decoding.column, columns, where)) is not None:
                    yield Document(f"{name}:{offset}", checked, has_replacements=replaced)
            offset += len(line)


def _read_parquet(path: Path, name: str, span: Span, decoding: Decoding) -> Iterator[Document]:
    """Reads the rows of one row group in batches.

    Only the sizes that the file states are known before it is decompressed. They are checked, and so is the text: with
    a dictionary or with prefixes (DELTA_BYTE_ARRAY), a row of a few bytes can repeat a text of any length.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    columns = file.schema_arrow.names
    if decoding.column not in columns:
        raise UserError(missing_column(decoding.column, columns, str(path)))
    expansion = _parquet_expansion(path, file.metadata, span.start, decoding)
    row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[span.start], columns=[decoding.column]):
        for text in batch.column(0).to_pylist():
            expansion.add(len(text) if isinstance(text, str) else 0)  # characters: no more than bytes
            if (checked := check_text(text, decoding.column, columns, f"{path}, row {row}")) is not None:
                yield Document(f"{name}:{row}", checked)
            row += 1


def _parquet_expansion(path: Path, metadata: Any, group: int, decoding: Decoding) -> _Expansion:
    """Returns the limit of one row group. Raises UserError if the sizes that the metadata states are not possible."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    parts = [[part.column(number) for number in range(part.num_columns)] for part in groups]
    compressed = [[column.total_compressed_size for column in part] for part in parts]
    if min(map(min, compressed)) < 0 or sum(map(sum, compressed)) > path.stat().st_size:
        raise UserError(f"{path} is damaged: the sizes of its columns do not fit in the file.")
    expansion = _Expansion(path, sum(compressed[group]), decoding.max_expansion, MIN_EXPANDED_BYTES // len(groups))
    expansion.add(sum(c.total_uncompressed_size for c in parts[group] if c.path_in_schema == decoding.column))
    expansion.expanded = 0
    return expansion


def check_text(text: object, column: str | None, columns: list[str], where: str) -> str | None:
    """Returns the text of a record, or None if it is null. Raises UserError if the column is missing or not text."""
    if column not in columns:
        raise UserError(missing_column(column, columns, where))
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{where}: data.column={column} contains {type(text).__name__} instead of text: {text!r:.80}. "
            f"The columns are {', '.join(columns)}."
        )
    return text if text is None else replace_surrogates(text)  # JSON escapes can encode lone surrogates


def missing_column(column: str | None, columns: list[str], where: str) -> str:
    """Returns the error message for a missing column, with the names of the existing ones."""
    problem = "data.column is required to read" if column is None else f"data.column={column} is not in"
    return f"{problem} {where}. Its columns are: {', '.join(columns) or 'none'}."
