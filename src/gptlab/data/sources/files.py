"""Corpora of files, and the interface of all corpora."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from gptlab.data.sources.readers import Decoding, Document, Span, read_documents, split_spans


class Task(NamedTuple):
    """Part of a corpus that is prepared independently of the others. Does not depend on the number of workers.

    Attributes:
        number: Index of the task in the corpus.
        parts: Spans of input files; the file names are relative to the root of the corpus.
    """

    number: int
    parts: list[tuple[str, Span]]

    @property
    def bytes(self) -> int:
        """Approximate number of bytes of text."""
        return sum(span.bytes for _, span in self.parts)


class Corpus(Protocol):
    """Collection of documents, in a fixed order."""

    @property
    def origin(self) -> str:
        """Source of the documents, for messages."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash that changes with the source. It is cheap enough to compute at every start."""
        ...

    @property
    def bytes(self) -> int:
        """Approximate number of bytes of text, as stored; 0 if unknown."""
        ...

    def tasks(self, size: int) -> list[Task]:
        """Splits the corpus into tasks of about ``size`` bytes, deterministically."""
        ...

    def documents(self, task: Task) -> Iterator[Document]:
        """Yields the documents of a task, in order."""
        ...


@dataclass(frozen=True)
class FileCorpus:
    """Files below ``root``. Every text file and every record of a jsonl or parquet file is one document."""

    root: Path
    paths: list[Path]
    decoding: Decoding

    @property
    def origin(self) -> str:
        """Path of a single file, or the root directory of several."""
        return str(self.paths[0] if len(self.paths) == 1 else self.root)

    def fingerprint(self) -> str:
        """Returns a hash of the names, sizes and modification times of the files, and of the decoding options."""
        digest = hashlib.sha256(f"{self.decoding}\n".encode())
        for path in self.paths:
            stat = path.stat()
            digest.update(f"{path.relative_to(self.root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(path.stat().st_size for path in self.paths)

    def tasks(self, size: int) -> list[Task]:
        """Groups small files and splits large ones."""
        parts = ((str(path.relative_to(self.root)), span) for path in self.paths for span in split_spans(path, size))
        return _group_parts(parts, size)

    def documents(self, task: Task) -> Iterator[Document]:
        """Yields the documents of a task, in order."""
        for name, span in task.parts:
            yield from read_documents(self.root / name, Path(name).as_posix(), span, self.decoding)


def _group_parts(parts: Iterable[tuple[str, Span]], size: int) -> list[Task]:
    """Groups consecutive parts into tasks of about ``size`` bytes."""
    groups: list[list[tuple[str, Span]]] = []
    room = 0
    for name, span in parts:
        if room <= 0:
            groups.append([])
            room = size
        groups[-1].append((name, span))
        room -= span.bytes
    return [Task(number, group) for number, group in enumerate(groups)]
