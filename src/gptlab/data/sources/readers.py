"""Readers of file formats: splits a file into independent spans and reads the documents of a span.

The result does not depend on the spans. The names of documents do not depend on them, and a text that is too large for
one span is split only where the pre-tokenization of GPT-2 also splits it.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from gptlab.data.sources.compression import BLOCK_BYTES, MIN_EXPANDED_BYTES, Expansion, name_damage, open_file
from gptlab.data.sources.file_types import FileType
from gptlab.data.tokenizers.text import replace_surrogates
from gptlab.errors import UserError

UNDIVIDED = 2**62  # value of ``Decoding.part_bytes`` with which no text is divided
PARQUET_ROWS = 16  # rows that are decoded at a time; a few bytes can repeat a long text in each row
MAX_CHARACTER_BYTES = 4  # of a character in UTF-8
BOM = "\ufeff"  # byte order mark, which some programs write at the start of a file; not part of the text

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
        has_replacements: Whether U+FFFD replaces bytes that are not valid UTF-8, or lone surrogates.
    """

    name: str
    text: str
    begin: float = 0.0
    end: float = 1.0
    has_replacements: bool = False


class Span(NamedTuple):
    """Range of bytes of a file, or of row groups of a parquet file.

    Attributes:
        start: Start of the range.
        stop: End of the range.
        bytes: Its approximate size in bytes.
        type: Type of the file.
    """

    start: int
    stop: int
    bytes: int
    type: FileType = FileType()


@dataclass(frozen=True)
class Decoding:
    """Options for reading text. Its repr is part of the fingerprint of a corpus.

    Attributes:
        column: Column or field of a record that holds the text (jsonl, parquet).
        undecodable: Handling of bytes that are not valid UTF-8: "replace" inserts U+FFFD, "refuse" raises an error.
        part_bytes: Size in bytes of the parts in which a compressed text is read; ``UNDIVIDED`` for whole texts.
        max_expansion: Maximum ratio of the decompressed to the compressed size of a file. Not part of the fingerprint,
            because it does not change the text.
    """

    column: str | None
    undecodable: Literal["replace", "refuse"]
    part_bytes: int
    max_expansion: float = field(default=math.inf, repr=False)


def split_spans(path: Path, size: int, kind: FileType) -> Iterator[Span]:
    """Splits a file of a known type into spans of about ``size`` bytes, deterministically."""
    length = path.stat().st_size
    if kind.format == "parquet":
        import pyarrow.parquet as pq

        with name_damage(path, "parquet"):
            metadata = pq.read_metadata(path)
        for group in range(metadata.num_row_groups):
            yield Span(group, group + 1, metadata.row_group(group).total_byte_size, kind)
    elif kind.compression or length <= size:
        yield Span(0, length, length, kind)
    else:
        cuts = [0]
        while cuts[-1] < length:
            wanted = cuts[-1] + size
            cuts.append(_next_cut(path, wanted, kind) if wanted < length else length)
        yield from (Span(start, stop, stop - start, kind) for start, stop in pairwise(cuts))


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
    if span.type.format == "parquet":
        with name_damage(path, "parquet"):
            yield from _read_parquet(path, name, span, decoding)
    elif span.type.format == "jsonl":
        yield from _read_jsonl(path, name, span, decoding)
    elif span.type.compression:
        yield from _read_compressed_text(path, name, span, decoding)
    else:
        yield _read_text(path, name, span, decoding)


def _next_cut(path: Path, wanted: int, kind: FileType) -> int:
    """Returns the first offset >= ``wanted`` at which a file can be split: after a line, or before whitespace."""
    pattern = re.compile(rb"\n") if kind.format == "jsonl" else CUT
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


def _decode(data: bytes, undecodable: str, where: str, start: int = 0) -> tuple[str, bool]:
    """Decodes UTF-8 and returns the text and whether bytes were replaced.

    Args:
        data: The bytes.
        undecodable: See ``Decoding``.
        where: Path of the file, and the record if it has records.
        start: Offset of ``data`` in the file, for the message.
    """
    if (null := data.find(0)) >= 0:
        raise UserError(
            f"{where} has a null byte at byte {start + null}, so it is binary data or text in UTF-16. Remove the file, "
            "convert it to UTF-8, or remove the null bytes, for example with: tr -d '\\0'"
        )
    try:
        return data.decode(), False
    except UnicodeDecodeError as error:
        if undecodable == "replace":
            return data.decode(errors="replace"), True
        raise UserError(
            f"{where} is not UTF-8 at byte {start + error.start}: {data[error.start : error.start + 8]!r}. "
            "data.undecodable=replace replaces such bytes with U+FFFD."
        ) from error


def _read_text(path: Path, name: str, span: Span, decoding: Decoding) -> Document:
    length = max(path.stat().st_size, 1)
    with path.open("rb") as plain:
        plain.seek(span.start)
        data = plain.read(span.stop - span.start)
    text, replaced = _decode(data, decoding.undecodable, str(path), span.start)
    text = text if span.start else text.removeprefix(BOM)
    return Document(name, text, span.start / length, span.stop / length if span.stop else 1.0, replaced)


def _read_compressed_text(path: Path, name: str, span: Span, decoding: Decoding) -> Iterator[Document]:
    """Reads a compressed text in the parts into which ``split_spans`` would split the decompressed file."""
    kind = span.type.compression
    with open_file(path, kind, decoding.max_expansion) as file:
        length = sum(map(len, iter(lambda: file.read(BLOCK_BYTES), b"")))  # headers do not reliably have the length
    with open_file(path, kind, decoding.max_expansion) as file:
        start = 0
        for data in _split_parts(file, decoding.part_bytes):
            stop = start + len(data)
            text, replaced = _decode(data, decoding.undecodable, str(path), start)
            text = text if start else text.removeprefix(BOM)
            yield Document(name, text, start / max(length, 1), stop / length if length else 1.0, replaced)
            start = stop


def _split_parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields parts of about ``size`` bytes, split as in ``split_spans``. An empty file is one part."""
    if size == UNDIVIDED:
        yield file.read()
        return
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
    with open_file(path, span.type.compression, decoding.max_expansion) as file:
        if span.start:
            file.seek(span.start)
        offset, stop = span.start, sys.maxsize if span.type.compression else span.stop
        while offset < stop:
            line = file.readline()
            if not line:
                return
            where = f"{path}, line at byte {offset}"
            content, replaced = _decode(line, decoding.undecodable, where)
            content = content if offset else content.removeprefix(BOM)
            if content.strip():
                try:
                    record = json.loads(content)
                except (ValueError, RecursionError) as error:  # not JSON, or nested too deeply
                    raise UserError(f"{where} is not JSON: {error}.") from error
                text = record.get(decoding.column) if isinstance(record, dict) else None
                columns = list(record) if isinstance(record, dict) else []
                checked = check_text(text, decoding.column, columns, where, decoding.undecodable)
                if checked is not None:
                    yield Document(f"{name}:{offset}", checked[0], has_replacements=replaced or checked[1])
            offset += len(line)


def _read_parquet(path: Path, name: str, span: Span, decoding: Decoding) -> Iterator[Document]:
    """Reads the rows of one row group in batches.

    Only the sizes that the file states are known before it is decompressed. They are checked, and so is the text: with
    a dictionary or with prefixes (DELTA_BYTE_ARRAY), a row of a few bytes can repeat a text of any length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, page_checksum_verification=True)  # for files that have checksums
    columns = file.schema_arrow.names
    if decoding.column not in columns:
        raise UserError(missing_column(decoding.column, columns, str(path)))
    if (number := columns.count(decoding.column)) > 1:
        raise UserError(f"{path} has {number} columns named {decoding.column}. Rename all but one.")
    kind = file.schema_arrow.field(decoding.column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    expansion = _parquet_expansion(path, file.metadata, span.start, decoding)
    row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[span.start], columns=[decoding.column]):
        column = batch.column(0).cast(kind) if is_string else batch.column(0)
        if is_string:
            expansion.add(column.nbytes)
        for value in _values(column):
            where = f"{path}, row {row}"
            text, replaced = value, False
            if isinstance(value, bytes) and is_string:
                text, replaced = _decode(value, decoding.undecodable, where)
            if (checked := check_text(text, decoding.column, columns, where, decoding.undecodable)) is not None:
                yield Document(f"{name}:{row}", checked[0], has_replacements=replaced or checked[1])
            row += 1


def _values(column: Any) -> list[Any]:
    """Returns the values of a column; if a string is not valid UTF-8, which pyarrow does not check, all as bytes."""
    import pyarrow as pa

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        is_large = pa.types.is_large_string(column.type)
        return column.cast(pa.large_binary() if is_large else pa.binary()).to_pylist()


def _parquet_expansion(path: Path, metadata: Any, group: int, decoding: Decoding) -> Expansion:
    """Returns the limit of one row group. Raises UserError if the sizes that the metadata states are not possible."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    parts = [[part.column(number) for number in range(part.num_columns)] for part in groups]
    compressed = [[column.total_compressed_size for column in part] for part in parts]
    if min(map(min, compressed)) < 0 or sum(map(sum, compressed)) > path.stat().st_size:
        raise UserError(f"{path} is damaged: the sizes of its columns do not fit in the file.")
    expansion = Expansion(path, sum(compressed[group]), decoding.max_expansion, MIN_EXPANDED_BYTES // len(groups))
    expansion.add(sum(c.total_uncompressed_size for c in parts[group] if c.path_in_schema == decoding.column))
    expansion.expanded = 0
    return expansion


def check_text(
    text: object, column: str | None, columns: list[str], where: str, undecodable: str
) -> tuple[str, bool] | None:
    """Checks the text of a record.

    Returns:
        The text and whether lone surrogates, which JSON can encode, were replaced by U+FFFD; None if it is null.

    Raises:
        UserError: The column is missing or is not text, or has lone surrogates with ``undecodable="refuse"``.
    """
    if column not in columns:
        raise UserError(missing_column(column, columns, where))
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{where}: data.column={column} contains {type(text).__name__} instead of text: {text!r:.80}. "
            f"The columns are {', '.join(columns)}."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if undecodable == "refuse":
            raise UserError(
                f"{where}: data.column={column} has a lone surrogate at character {error.start}, which is not valid "
                "Unicode. data.undecodable=replace replaces it with U+FFFD."
            ) from error
        return replace_surrogates(text), True
    return text, False


def missing_column(column: str | None, columns: list[str], where: str) -> str:
    """Returns the error message for a missing column, with the names of the existing ones."""
    problem = "data.column is required to read" if column is None else f"data.column={column} is not in"
    return f"{problem} {where}. Its columns are: {', '.join(columns) or 'none'}."
