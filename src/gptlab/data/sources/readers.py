"""Readers of file formats: splitting a file into independent spans, and reading the documents of a span.

Where a span lies does not change what is read: documents have names of their own, and a text that is too large for one
span is cut where no tokenizer of GPT-2's kind would join the sides.
"""

import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from gptlab.data.tokenizers.tokenizer import replace_surrogates
from gptlab.errors import UserError

WINDOW = 2**16  # bytes looked at in search of a place to cut
LONGEST = 4  # bytes of a character in UTF-8

# A character that is no white space (in UTF-8, of one byte to four) and then white space. GPT-2's pattern never joins
# the two, and looks at nothing before the place where it stands, so both sides are tokenized as they would be together.
CUT = re.compile(
    rb"(?:[!-~]"
    rb"|[\xc3-\xdf][\x80-\xbf]"  # U+0085 and U+00A0 begin with C2
    rb"|(?:(?!\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)[\xe1-\xef])[\x80-\xbf]{2}"
    rb"|[\xf0-\xf4][\x80-\xbf]{3})(?=[ \t\r\n])"
)


class Document(NamedTuple):
    """A document, or a part of one; its name does not depend on where the corpus is.

    Attributes:
        name: Of the whole document.
        text: Of this part.
        begin: Where the part begins, as a share of the document: 0 for a whole one.
        end: Where the part ends: 1 for a whole one.
        has_replacements: Whether U+FFFD in it replaces bytes that are not UTF-8.
    """

    name: str
    text: str
    begin: float = 0.0
    end: float = 1.0
    has_replacements: bool = False


class Span(NamedTuple):
    """Part of a file: bytes, or row groups of a parquet file; and its approximate size in bytes."""

    start: int
    stop: int
    bytes: int


class Decoding(NamedTuple):
    """Settings of reading text.

    Attributes:
        column: Where it stands in a record (jsonl, parquet).
        undecodable: What becomes of bytes that are no UTF-8.
        part_bytes: Of a compressed text, how much is held at a time.
    """

    column: str | None
    undecodable: Literal["replace", "refuse"]
    part_bytes: int


def split_spans(path: Path, size: int) -> Iterator[Span]:
    """Splits a file into spans of about ``size`` bytes, deterministically."""
    kind, length = file_kind(path), path.stat().st_size
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_metadata(path)
        except pa.ArrowException as error:
            raise UserError(f"{path} is damaged or no parquet: {error}") from error
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
    """Reads the documents of one span; raises UserError with the file and the position of what cannot be read."""
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
        raise UserError(f"{path} is damaged or not what its name says: {error}") from error


def file_kind(path: Path) -> str:
    """Returns the kind of a file by its name: parquet, jsonl or text, compressed or not."""
    suffix = Path(path.stem).suffix if _is_compressed(path) else path.suffix
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(suffix, "text")


class _Frames(io.RawIOBase):
    """Decompressed .zst file with all its frames; raises EOFError if the last is cut off, unlike zstandard."""

    def __init__(self, path: Path, begin: Callable[[], Any]) -> None:
        self._file, self._begin, self._text = path.open("rb"), begin, b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            ended = self._frame is None or self._frame.eof
            block = (self._frame.unused_data if self._frame and ended else b"") or self._file.read(WINDOW)
            if not block and ended:
                return 0
            if not block:
                raise EOFError("it ends in the middle of a frame")
            self._frame = self._begin() if ended else self._frame
            self._text = self._frame.decompress(block)
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _corruption_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that libraries raise for a damaged file, of those that are imported."""
    names = {"zstandard": "ZstdError", "pyarrow": "ArrowException"}
    found = [getattr(sys.modules[module], name) for module, name in names.items() if sys.modules.get(module)]
    return (EOFError, gzip.BadGzipFile, zlib.error, *found)


def _is_compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".zst")


def _open(path: Path) -> BinaryIO:
    """Opens a file, decompressed by its name."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path} cannot be decompressed without zstandard: pip install zstandard") from error
        return io.BufferedReader(_Frames(path, zstandard.ZstdDecompressor().decompressobj))
    return path.open("rb")


def _next_cut(path: Path, wanted: int, kind: str) -> int:
    """Returns the first offset at or after ``wanted`` where a file can be cut: after a line, or before white space."""
    pattern = re.compile(rb"\n") if kind == "jsonl" else CUT
    with path.open("rb") as file:
        offset, tail = max(wanted - LONGEST, 0), b""  # where the character that ends at wanted may begin
        file.seek(offset)
        while block := file.read(WINDOW):
            begin = offset - len(tail)
            for found in pattern.finditer(tail + block):
                if begin + found.end() >= wanted:
                    return begin + found.end()
            offset, tail = offset + len(block), (tail + block)[-LONGEST:]
    return path.stat().st_size


def _decode(data: bytes, decoding: Decoding, where: str, start: int = 0) -> tuple[str, bool]:
    """Decodes UTF-8; also returns whether bytes were replaced. An error names the byte, counted from ``start``."""
    try:
        return data.decode(), False
    except UnicodeDecodeError as error:
        if decoding.undecodable == "replace":
            return data.decode(errors="replace"), True
        raise UserError(
            f"{where} is not UTF-8 at byte {start + error.start}: {data[error.start : error.start + 8]!r}. "
            "data.undecodable=replace puts U+FFFD there."
        ) from error


def _read_text(path: Path, name: str, span: Span, decoding: Decoding) -> Document:
    length = max(path.stat().st_size, 1)
    with path.open("rb") as plain:
        plain.seek(span.start)
        text, replaced = _decode(plain.read(span.stop - span.start), decoding, str(path), span.start)
    return Document(name, text, span.start / length, span.stop / length if span.stop else 1.0, replaced)


def _read_compressed_text(path: Path, name: str, decoding: Decoding) -> Iterator[Document]:
    """Reads a compressed text in the parts that ``split_spans`` would make of the plain file."""
    with _open(path) as file:
        length = sum(map(len, iter(lambda: file.read(WINDOW), b"")))  # which nothing else tells for certain
    with _open(path) as file:
        start = 0
        for data in _split_parts(file, decoding.part_bytes):
            stop = start + len(data)
            text, replaced = _decode(data, decoding, str(path), start)
            yield Document(name, text, start / max(length, 1), stop / length if length else 1.0, replaced)
            start = stop


def _split_parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields parts of about ``size`` bytes, cut like ``split_spans``; an empty file is one part."""
    held, ended = bytearray(), False
    while not ended:
        begin, cut = max(size - LONGEST, 0), None
        while not ended:
            cut = next((found.end() for found in CUT.finditer(held, begin) if found.end() >= size), None)
            if cut is not None:
                break
            begin = max(begin, len(held) - LONGEST)  # where a character may begin that what follows cuts off
            block = file.read(max(WINDOW, size - len(held)))
            held += block
            ended = not block
        yield bytes(held[:cut])  # to the end, where there is no cut
        del held[:cut]


def _read_jsonl(path: Path, name: str, span: Span, decoding: Decoding) -> Iterator[Document]:
    """Reads one JSON object per line; a document is named by the offset of its line in the decompressed file."""
    with _open(path) as file:
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
                except (ValueError, RecursionError) as error:  # no JSON, or more than Python takes
                    raise UserError(f"{where}: not JSON: {error}.") from error
                text = record.get(decoding.column) if isinstance(record, dict) else None
                columns = list(record) if isinstance(record, dict) else []
                if (checked := check_text(text, decoding.column, columns, where)) is not None:
                    yield Document(f"{name}:{offset}", checked, has_replacements=replaced)
            offset += len(line)


def _read_parquet(path: Path, name: str, span: Span, decoding: Decoding) -> Iterator[Document]:
    """Reads the rows of one row group, a few at a time."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    columns = file.schema_arrow.names
    if decoding.column not in columns:
        raise UserError(missing_column(decoding.column, columns, str(path)))
    row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    for batch in file.iter_batches(batch_size=1024, row_groups=[span.start], columns=[decoding.column]):
        for text in batch.column(0).to_pylist():
            if (checked := check_text(text, decoding.column, columns, f"{path}, row {row}")) is not None:
                yield Document(f"{name}:{row}", checked)
            row += 1


def check_text(text: object, column: str | None, columns: list[str], where: str) -> str | None:
    """Returns a record's text, which may be None; raises UserError if the column is missing or not text."""
    if column not in columns:
        raise UserError(missing_column(column, columns, where))
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{where}: data.column={column} holds no text but {type(text).__name__}: {text!r:.80}. "
            f"The columns are {', '.join(columns)}."
        )
    return text if text is None else replace_surrogates(text)  # JSON can spell lone surrogates


def missing_column(column: str | None, columns: list[str], where: str) -> str:
    """Returns the message that a column is missing, with those that exist."""
    named = "data.column is needed to read" if column is None else f"data.column={column} is not in"
    return f"{named} {where}; it has {', '.join(columns) or 'no columns'}."
