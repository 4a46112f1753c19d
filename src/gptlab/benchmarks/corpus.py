"""Corpus of real text that exists on every machine: the text files of Python and its packages, one document each."""

import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gptlab.errors import UserError
from gptlab.files import write_durably

CODE = {".py", ".pyi", ".pyx", ".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh", ".js", ".ts", ".css"}
SUFFIXES = CODE | {".html", ".md", ".rst", ".txt", ".json", ".csv", ".xml", ".toml", ".yaml", ".ipynb"}
LARGEST = 2**20  # bytes; larger files are mostly tables of data


class TextCorpus(NamedTuple):
    """JSON Lines file of documents, {"text": ...}.

    Attributes:
        path: Path of the file.
        bytes: Number of UTF-8 bytes of all documents.
        documents: Number of documents.
        distinct: Number of bytes of distinct documents; less than ``bytes`` if this machine has too little text.
    """

    path: Path
    bytes: int
    documents: int
    distinct: int


def text_corpus(folder: Path, megabytes: int) -> TextCorpus:
    """Returns a corpus of at least ``megabytes`` MB, which is created if it is not in ``folder``.

    Raises:
        UserError: There are no text files.
    """
    path, about = folder / f"text-{megabytes}MB.jsonl", folder / f"text-{megabytes}MB.json"
    if path.exists() and about.exists():
        return TextCorpus(path, **json.loads(about.read_text()))
    wanted, size, documents, distinct = megabytes * 10**6, 0, 0, 0
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".jsonl", encoding="utf-8", delete=False) as file:
        unfinished = Path(file.name)
        try:
            while size < wanted:
                before = size
                for text in _texts():
                    file.write(json.dumps({"text": text}) + "\n")
                    size, documents = size + len(text.encode()), documents + 1
                    if size >= wanted:
                        break
                if size == before:
                    raise UserError(f"No text files found in {' or '.join(map(str, _roots()))}.")
                distinct = distinct or size
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    write_durably(about, json.dumps({"bytes": size, "documents": documents, "distinct": distinct}))
    return TextCorpus(path, size, documents, distinct)


def _roots() -> list[Path]:
    return sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})


def _texts() -> Iterator[str]:
    """Yields every distinct text once, in an order that mixes the packages."""
    walks = ((folder, name) for root in _roots() for folder, _, names in os.walk(root) for name in names)
    paths = {Path(folder, name) for folder, name in walks if Path(name).suffix in SUFFIXES}
    seen = set()
    for path in sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest()):
        try:
            content = path.read_bytes() if path.stat().st_size <= LARGEST else b""
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(content).digest()
        if text and digest not in seen:
            seen.add(digest)
            yield text
