"""Custom readers: components that yield documents.

The documents are stored in the directory of the shards until these are complete, so that a reader runs only once and
its documents are divided into tasks like those of any other file.
"""

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.config.components import TARGET, build_component, check_component, component_arguments, hash_sources
from gptlab.data.sources.file_types import FileType
from gptlab.data.sources.files import FileCorpus, Task
from gptlab.data.sources.readers import Decoding, Document, Span
from gptlab.data.tokenizers.text import replace_surrogates
from gptlab.errors import UserError
from gptlab.files import is_disk_full, temporary_path

log = logging.getLogger(__name__)

DOCUMENTS = "documents.jsonl"  # one [name, text] per line, present only while the shards are prepared


class DocumentReader(ABC):
    """Base class of custom readers.

    The arguments of a reader are those of its ``__init__``, which should be fast: prepared data is found by the target,
    the arguments, the file of the class and ``fingerprint``, without reading the documents again.
    """

    @abstractmethod
    def documents(self) -> Iterator[str | tuple[str, str]]:
        """Yields the documents, in the same order each time: texts, or pairs of a name and a text.

        A document is assigned to train or val by its name, which is its index by default.
        """

    def fingerprint(self) -> str:
        """Returns a text that changes with the input, such as the modification time of a file; empty by default."""
        return ""


def check_reader(component: Mapping[str, Any]) -> type[DocumentReader]:
    """Checks the target and the arguments of a reader.

    Returns:
        The class of the reader.

    Raises:
        UserError: The target is not a ``DocumentReader`` with a method ``documents``, or an argument is not valid.
    """
    target: type[DocumentReader] = check_component("data.reader", component, DocumentReader)
    if getattr(target, "__abstractmethods__", None):
        raise UserError(f"data.reader.{TARGET}={component[TARGET]} has no method documents().")
    return target


@dataclass(frozen=True)
class ReaderCorpus:
    """Documents of a reader, as a single task that runs the reader.

    Attributes:
        component: The reader.
    """

    component: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """Target and arguments of the reader."""
        arguments = (f"{name}={value}" for name, value in component_arguments(self.component).items())
        return f"{self.component[TARGET]}({', '.join(arguments)})"

    def fingerprint(self) -> str:
        """Returns a hash of the target, the arguments, the source file and the fingerprint of the reader."""
        is_default = check_reader(self.component).fingerprint is DocumentReader.fingerprint
        content = [self.component, hash_sources(self.component), "" if is_default else str(self._build().fingerprint())]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """0, because the size is unknown."""
        return 0

    def tasks(self, size: int) -> list[Task]:
        """Returns the single task."""
        return [Task(0, [("documents", Span(0, 1, 1))])]

    def documents(self, task: Task) -> Iterator[Document]:
        """Yields the documents of the reader, each named by its index unless the reader names it."""
        for index, item in enumerate(self._build().documents()):
            named = (str(index), item) if isinstance(item, str) else item
            if not (isinstance(named, tuple) and len(named) == 2 and all(isinstance(part, str) for part in named)):
                raise UserError(
                    f"data.reader.{TARGET}={self.component[TARGET]}: documents() yields {item!r:.60} as document "
                    f"{index}, which is neither a text nor a pair of a name and a text."
                )
            name, text = named
            yield Document(replace_surrogates(name), replace_surrogates(text))

    def store(self, folder: Path) -> "StoredDocuments":
        """Writes the documents to a file in ``folder``, unless it exists.

        Raises:
            UserError: The reader yields no documents or something else, or the disk is full.
        """
        path = folder / DOCUMENTS
        if not path.exists():
            log.info("Reading the documents of %s", self.origin)
            folder.mkdir(exist_ok=True)
            unfinished = temporary_path(path)
            try:
                self._write(unfinished)
                unfinished.replace(path)
            except BaseException as error:
                unfinished.unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    folder.rmdir()
                if is_disk_full(error):
                    raise UserError(f"The disk of {folder} is full. It needs space for the documents.") from error
                raise
        return StoredDocuments(folder, [path], Decoding(None, "replace", 0), self.origin)

    def _write(self, path: Path) -> None:
        (task,) = self.tasks(0)
        with path.open("x", encoding="utf-8", newline="\n") as file:
            for document in self.documents(task):
                file.write(json.dumps([document.name, document.text], ensure_ascii=False) + "\n")
            if not file.tell():
                raise UserError(f"data.reader.{TARGET}={self.component[TARGET]} yields no documents.")
            file.flush()
            os.fsync(file.fileno())

    def _build(self) -> DocumentReader:
        reader: DocumentReader = build_component(self.component)
        return reader


@dataclass(frozen=True)
class StoredDocuments(FileCorpus):
    """Stored documents of a reader.

    Attributes:
        name: Target and arguments of the reader.
    """

    name: str

    @property
    def origin(self) -> str:
        """Target and arguments of the reader."""
        return self.name

    def typed_files(self, skipped: Counter[str] | None = None) -> Iterator[tuple[Path, FileType]]:
        """Yields the file."""
        yield self.paths[0], FileType("jsonl")

    def documents(self, task: Task) -> Iterator[Document]:
        """Yields the documents of a task, in order."""
        for name, span in task.parts:
            with (self.root / name).open("rb") as file:
                file.seek(span.start)
                while file.tell() < span.stop:
                    yield Document(*json.loads(file.readline()))
