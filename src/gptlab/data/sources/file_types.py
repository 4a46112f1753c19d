"""Types of corpus files, from their content and their names. Imports no torch."""

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

from gptlab.data.sources.compression import Compression, open_file
from gptlab.errors import UserError

HEAD_BYTES = 2**13  # bytes from which the type is determined; git looks for a null byte in as many
MAX_LINE_BYTES = 2**24  # longest first line of a .json file that is parsed to determine its type
MAX_UNDECODABLE = 0.3  # share of the bytes of a text; text in Latin-1 has less, text in another encoding more

_COMPRESSIONS: tuple[tuple[re.Pattern[bytes], Compression], ...] = (
    (re.compile(rb"\x1f\x8b"), "gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zstd"),  # a frame, a skippable frame
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2"),  # a block, the end of an empty stream
    (re.compile(rb"\xfd7zXZ\0"), "xz"),
)
_SUFFIXES: dict[str, Compression] = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
}
_EXTRACT = "Extract it and set data.source to the directory."
_CONVERT = "Convert it to .parquet or .jsonl, for example with pandas."
_ENCODE = "Convert it to UTF-8, for example with iconv."
_BINARIES = (  # first bytes, description, what to do
    (b"PK\x03\x04", "a ZIP archive", _EXTRACT),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _EXTRACT),
    (b"Rar!\x1a\x07", "a RAR archive", _EXTRACT),
    (b"ARROW1\0\0", "an Arrow file", _CONVERT),
    (b"\xff\xff\xff\xff", "an Arrow stream or another binary file", "data=huggingface reads saved datasets."),
    (b"Obj\x01", "an Avro file", _CONVERT),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"%PDF-", "a PDF file", "Extract its text first."),
    (b"\xff\xfe", "text in UTF-16 or UTF-32", _ENCODE),
    (b"\xfe\xff", "text in UTF-16", _ENCODE),
    (b"\0\0\xfe\xff", "text in UTF-32", _ENCODE),
)
_TABLES = {".csv": "a CSV table", ".tsv": "a TSV table"}
_ARRAY = 'Write one object per line, for example with: jq -c ".[]" <file>.json > <file>.jsonl'


class FileType(NamedTuple):
    """Format of a file and its compression, if any."""

    format: Literal["text", "jsonl", "parquet"] = "text"
    compression: Compression | None = None


class UnsupportedFileError(UserError):
    """The file is neither text nor in a supported format.

    Attributes:
        kind: What the file is.
    """

    def __init__(self, path: Path, kind: str, hint: str = "") -> None:
        super().__init__(
            f"{path} is {kind}. data=text reads text in UTF-8, .jsonl and .parquet files, and text and .jsonl files "
            f"that are compressed with gzip, zstd, bzip2 or xz. {hint}".rstrip()
        )
        self.kind = kind


def detect_type(path: Path, column: str | None = None) -> FileType:
    """Determines the type of a file from its first bytes and its suffixes.

    Args:
        path: Path of the file.
        column: ``data.column``: a text whose first line is a JSON object is read as .jsonl if there is one.

    Raises:
        UnsupportedFileError: The file is binary, has another encoding than UTF-8 or another format.
        UserError: The file is compressed and damaged.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    named = _SUFFIXES.get(suffixes[-1]) if suffixes else None
    if named:
        suffixes.pop()
    compression = next((kind for magic, kind in _COMPRESSIONS if magic.match(head)), named if head else None)
    if compression:
        head = _read_head(path, compression)
    suffix = suffixes[-1] if suffixes else ""
    is_parquet = suffix in (".parquet", ".parq", ".pq") or (head.startswith(b"PAR1") and _is_binary(head))
    if not compression and is_parquet:
        return FileType("parquet")
    _check_binary(path, head, compression)
    if suffix in _TABLES:
        raise UnsupportedFileError(path, _TABLES[suffix], _CONVERT)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix in (".jsonl", ".ndjson", ".jsonlines", ".json"):
        if start == b"[":
            raise UnsupportedFileError(path, "a JSON array", _ARRAY)
        if suffix == ".json" and not _begins_with_object(path, compression):
            raise UnsupportedFileError(path, "a JSON document of several lines", _ARRAY)
        return FileType("jsonl", compression)
    if column and start == b"{" and _begins_with_object(path, compression):
        return FileType("jsonl", compression)
    return FileType("text", compression)


def _read_head(path: Path, compression: Compression) -> bytes:
    with open_file(path, compression) as file:
        return file.read(HEAD_BYTES)


def _check_binary(path: Path, head: bytes, compression: Compression | None) -> None:
    """Raises UnsupportedFileError unless ``head`` is the start of a text in UTF-8."""
    content = f"{compression}-compressed and contains " if compression else ""
    for magic, kind, hint in _BINARIES:
        if head.startswith(magic):
            raise UnsupportedFileError(path, f"{content}{kind}", hint)
    if head[257:262] == b"ustar":
        raise UnsupportedFileError(path, f"{content}a tar archive", _EXTRACT)
    is_parquet = head.startswith(b"PAR1") and _is_binary(head)
    if compression and (is_parquet or any(magic.match(head) for magic, _ in _COMPRESSIONS)):
        raise UnsupportedFileError(path, f"{content}compressed data", "Decompress it first.")
    if not _is_binary(head):
        return
    if head.startswith(b"ORC"):
        raise UnsupportedFileError(path, f"{content}an ORC file", _CONVERT)
    if b"\0" in head:
        raise UnsupportedFileError(path, f"{content}binary data, or text in UTF-16")
    raise UnsupportedFileError(path, f"{content}binary data, or text in another encoding than UTF-8", _ENCODE)


def _is_binary(head: bytes) -> bool:
    """Returns whether the start of a file is not text in UTF-8."""
    wrong = head.decode(errors="replace").count("\ufffd") - head.count("\ufffd".encode())
    # the last character may be incomplete
    return b"\0" in head or (wrong > 1 and wrong > MAX_UNDECODABLE * len(head))


def _begins_with_object(path: Path, compression: Compression | None) -> bool:
    """Returns whether the first line that is not empty is a JSON object."""
    with open_file(path, compression) as file:
        for line in iter(lambda: file.readline(MAX_LINE_BYTES), b""):
            if text := line.removeprefix(b"\xef\xbb\xbf").strip():
                try:
                    return isinstance(json.loads(text.decode(errors="replace")), dict)
                except (ValueError, RecursionError):
                    return False
    return False
