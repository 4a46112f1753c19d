"""Corpora of files, and the interface of all corpora."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from gptlab.data.sources.file_types import FileType, UnsupportedFileError, detect_type
from gptlab.data.sources.readers import UNDIVIDED, Decoding, Document, Span, read_documents, split_spans
from gptlab.errors import UserError

log = logging.getLogger(__name__)

READING = 2  # version of the rules by which files are read; part of the fingerprint


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
    """Files below ``root``. Every text file and every record of a jsonl or parquet file is one document.

    A file that is neither is skipped if there are several, and refused otherwise.
    """

    root: Path
    paths: list[Path]
    decoding: Decoding

    @property
    def origin(self) -> str:
        """Path of a single file, or the root directory of several. Bytes that are not UTF-8 are shown as escapes."""
        path = str(self.paths[0] if len(self.paths) == 1 else self.root)
        return path.encode(errors="backslashreplace").decode()

    def fingerprint(self) -> str:
        """Returns a hash of the names, sizes and modification times of the files, and of the decoding options."""
        return hash_listing(self.root, self.paths, f"{self.decoding}, {READING}")

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(path.stat().st_size for path in self.paths)

    def typed_files(self, skipped: Counter[str] | None = None) -> Iterator[tuple[Path, FileType]]:
        """Yields the files that are read, with their types.

        Args:
            skipped: Counts the files that are skipped, by their suffixes and what they are.

        Raises:
            UserError: The only file is not supported, or a file is damaged.
        """
        for path in self.paths:
            if not path.stat().st_size:
                continue
            try:
                kind = detect_type(path, self.decoding.column)
            except UnsupportedFileError as error:
                if len(self.paths) == 1:
                    raise
                if skipped is not None:
                    skipped[f"{path.suffix or path.name} ({error.kind})"] += 1
                continue
            yield path, kind

    def tasks(self, size: int) -> list[Task]:
        """Groups small files and splits large ones. Logs how many files are read and how many are skipped."""
        skipped: Counter[str] = Counter()
        files = list(self.typed_files(skipped))
        self._check_types(files, skipped)
        text_size = UNDIVIDED if self.decoding.part_bytes == UNDIVIDED else size
        parts = (
            (str(path.relative_to(self.root)), span)
            for path, kind in files
            for span in split_spans(path, text_size if kind.format == "text" else size, kind)
        )
        return _group_parts(parts, size)

    def _check_types(self, files: list[tuple[Path, FileType]], skipped: Counter[str]) -> None:
        if len(self.paths) > 1:
            read = Counter(f"{path.suffix or path.name} ({kind.format})" for path, kind in files)
            log.log(
                logging.WARNING if skipped else logging.INFO,
                "%s: files that are read: %s; files that are skipped: %s",
                *(self.origin, _listed(read) or "none", _listed(skipped) or "none"),
            )
        if not files and skipped:
            raise UserError(f"{self.origin} contains no text and no .jsonl or .parquet file, only {_listed(skipped)}.")
        if self.decoding.column and all(kind.format == "text" for _, kind in files):
            raise UserError(
                f"data.column={self.decoding.column} is set, but {self.origin} is plain text, which has no columns. "
                "Remove data.column, or use .jsonl or .parquet files."
            )

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


def hash_listing(root: Path, paths: list[Path], header: str) -> str:
    """Returns a hash of the names, sizes and modification times of files, and of a text."""
    digest = hashlib.sha256(f"{header}\n".encode())
    for path in paths:
        stat = path.stat()
        digest.update(os.fsencode(path.relative_to(root)) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _listed(counts: Counter[str]) -> str:
    """Returns the counts as text: "3 .png (binary data), 1 .zip (a ZIP archive)"."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
