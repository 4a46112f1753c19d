"""Shards behind a URL, prefetched into a local folder of limited size. Imports no torch.

All processes of a machine share the folder: a shard has its name there only when its SHA-256 is right, whoever fetches
it holds its lock, and the shard that was not used for longest makes room for the next.
"""

import errno
import functools
import glob
import hashlib
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from gptlab.data.shards.manifest import LOCK, MANIFEST, SUFFIXES, Shard, load_manifest
from gptlab.errors import UserError

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 8  # to fetch a file before giving up: about two minutes
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between attempts: twice as long each time
DENIED_STATUSES = (401, 403)  # statuses of HTTP that will not change by asking again
SILENCE = 60.0  # seconds without a byte after which a connection counts as broken


class RemoteFolder:
    """Prepared folder behind any URL that fsspec opens: s3://, gs://, hf://, https://, file://.

    Args:
        url: Of the folder; credentials come from the environment, never in the URL.
        cache_dir: Where fetched shards are kept, in a folder of their own.
        limit: Bytes that they may take there.

    Raises:
        UserError: The URL holds a password, there is no manifest behind it or nothing can open it, or the manifest
            names files that are not beside it.
    """

    def __init__(self, url: str, cache_dir: Path, limit: float) -> None:
        _check_no_secret(url)
        self.url, self.limit = url.rstrip("/"), limit
        with tempfile.TemporaryDirectory() as folder:
            self._get(MANIFEST, Path(folder) / MANIFEST)
            try:
                self.manifest = load_manifest(Path(folder))
            except UserError as error:
                raise UserError(f"What {self.url} has is no prepared data: {error}") from None
        self.sizes = {shard.file: self.manifest.file_size(shard) for shard in self.manifest.shards()}
        if elsewhere := [name for name in self.sizes if Path(name).name != name or Path(name).suffix not in SUFFIXES]:
            raise UserError(
                f"{self.url}/{MANIFEST} names {elsewhere[0]}, which does not lie beside it. It describes files of "
                "another machine: write them anew with python -m gptlab.prepare convert=..., or prepare them there."
            )
        # by content: what two URLs hold alike is kept once, and other shards never take the place of these, nor the
        # same ones under other names, which have the same fingerprint
        content = self.manifest.model_dump_json().encode()
        self.folder = cache_dir / f"remote-{hashlib.sha256(content).hexdigest()[:12]}"
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        self.manifest.save(self.folder)
        self._ahead: queue.Queue[Sequence[Shard]] = queue.Queue()
        self._fetcher = 0  # the process whose thread fetches ahead

    def __getstate__(self) -> dict[str, Any]:
        """Queues and threads do not travel to worker processes: each has its own."""
        return {**self.__dict__, "_ahead": None, "_fetcher": 0}

    def open(self, shard: Shard) -> FileIO:
        """Opens a shard's file, fetching it if it is missing.

        Raises:
            UserError: It cannot be fetched, or is not what the manifest says.
        """
        with self._lock(shard.file):
            return self._present(shard).open("rb", buffering=0)

    def check_room(self, at_once: Sequence[Shard]) -> None:
        """Raises UserError if the shards that are in use at the same time exceed the limit."""
        needed = sum({shard.file: self.sizes[shard.file] for shard in at_once}.values())
        if needed > self.limit:
            raise UserError(
                f"data.cache_limit_gb={self.limit / 1e9:g} is less than the {needed / 1e9:.3g} GB of {self.url} that "
                "are in use at the same time: fetching would never end. Give more, or use fewer shards at a time: "
                "data.order=block, with a smaller data.block_shards."
            )

    def expect(self, shards: Sequence[Shard]) -> None:
        """Fetches shards in the background, in order."""
        if self._fetcher != os.getpid():  # the first time, or in a worker that was forked
            self._fetcher, self._ahead = os.getpid(), queue.Queue()
            threading.Thread(target=self._fetch_ahead, daemon=True).start()
        self._ahead.put(shards)

    def _fetch_ahead(self) -> None:
        while True:
            for shard in self._ahead.get():
                if not self._ahead.empty():
                    break  # others are expected by now
                try:
                    with self._lock(shard.file).acquire(blocking=False):
                        self._present(shard)
                except Timeout:
                    continue  # another process fetches it
                except (UserError, OSError) as error:
                    log.warning("Not fetched ahead: %s", error)  # whoever reads it tries again, and fails if need be

    def _present(self, shard: Shard) -> Path:
        """Returns a shard's file, fetched and verified; the caller holds its lock."""
        path = self.folder / shard.file
        if not path.exists():
            for left in self.folder.glob(f".{glob.escape(shard.file)}.*"):  # by a process that was killed
                left.unlink(missing_ok=True)
            self._make_room(shard)
            log.info("Fetching %s/%s, %.1f MB.", self.url, shard.file, self.sizes[shard.file] / 1e6)
            self._get(shard.file, path, shard)
        os.utime(path)  # used now
        return path

    def _get(self, name: str, path: Path, shard: Shard | None = None) -> None:
        """Fetches a file, checks it, and renames it to its final name."""
        wrong = set[str]()
        _fetch_to(path, f"{self.url}/{name}", lambda unfinished: self._fetch(name, unfinished, shard, wrong))

    def _fetch(self, name: str, path: Path, shard: Shard | None, wrong: set[str]) -> None:
        """Fetches a file once; a wrong hash that is in ``wrong``, those of earlier attempts, is final."""
        filesystem, root = _filesystem(self.url)
        filesystem.get_file(f"{root}/{name}", str(path))
        if shard is None:
            return
        _check_size(path, self.sizes[name])
        with path.open("rb") as file:
            file.seek(shard.offset)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if found != shard.sha256:
            kind = UserError if found in wrong else OSError
            wrong.add(found)
            raise kind(f"what came has the SHA-256 {found}, not {shard.sha256}")

    def _make_room(self, shard: Shard) -> None:
        """Removes the least recently used shards until ``shard`` fits, and reserves its size for other processes."""
        with self._lock("room"):
            kept = sorted(
                (path for name in self.sizes if (path := self.folder / name).exists()),
                key=lambda path: path.stat().st_mtime,
            )
            coming = {path.name[1:].rpartition(".")[0] for path in self.folder.glob(".*.*")}
            used = sum(self.sizes[path.name] for path in kept) + sum(self.sizes.get(name, 0) for name in coming)
            used += self.sizes[shard.file]
            for path in kept:
                if used <= self.limit:
                    break
                try:
                    with self._lock(path.name).acquire(blocking=False):
                        path.unlink(missing_ok=True)  # whoever has it open reads on
                        used -= self.sizes[path.name]
                except Timeout:
                    continue  # it is being opened
            _temporary_path(self.folder / shard.file).touch()

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / name)


def fetch_files(pattern: str, cache_dir: Path) -> Path:
    """Fetches all token files that a URL with wildcards matches; returns their folder.

    Nothing says what their SHA-256 should be, so only their sizes are checked here.
    """
    _check_no_secret(pattern)
    folder = cache_dir / f"files-{hashlib.sha256(pattern.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}

    def look() -> None:
        filesystem, path = _filesystem(pattern)
        found.update(filesystem.glob(path, detail=True))

    def fetch(place: str, unfinished: Path) -> None:
        filesystem, _ = _filesystem(pattern)
        filesystem.get_file(place, str(unfinished))
        _check_size(unfinished, filesystem.size(place))

    with FileLock(f"{folder}{LOCK}"):
        _with_retries(pattern, look)
        for place, about in sorted(found.items()):
            path = folder / PurePosixPath(place).name
            if about["type"] == "file" and not path.exists():
                log.info("Fetching %s.", place)
                _fetch_to(path, place, functools.partial(fetch, place))
    if not any(folder.iterdir()):
        raise UserError(f"data.path={pattern} matches nothing.")
    return folder


def _fetch_to(path: Path, what: str, fetch: Callable[[Path], None]) -> None:
    """Fetches a file under a temporary name, and renames it when it is complete."""
    unfinished = _temporary_path(path)
    try:
        _with_retries(what, lambda: fetch(unfinished))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_size(path: Path, expected: int) -> None:
    if (size := path.stat().st_size) != expected:
        raise OSError(f"{size:,} bytes came of {expected:,}")


def _with_retries(what: str, fetch: Callable[[], None]) -> None:
    """Calls ``fetch``, again after a transient failure, with growing waits."""
    import tenacity  # needed by remote shards alone

    def tell(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None  # noqa: S101, PT018
        log.warning(
            "%s: %s. Attempt %d of %d in %.0f s.",
            *(what, _reason(state.outcome.exception())),
            *(state.attempt_number + 1, MAX_ATTEMPTS, state.next_action.sleep),
        )

    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(MAX_ATTEMPTS),
        wait=tenacity.wait_exponential(FIRST_WAIT, LONGEST_WAIT) + tenacity.wait_random(0, FIRST_WAIT),
        retry=tenacity.retry_if_exception(_is_transient),
        before_sleep=tell,
        reraise=True,
    )
    try:
        attempts(fetch)
    except FileNotFoundError:
        raise UserError(f"{what} is not there.") from None
    except Exception as error:
        raise UserError(f"{what} could not be fetched: {_reason(error)}.") from error


def _check_no_secret(url: str) -> None:
    for link in url.split("::"):  # of a chain, as in simplecache::https://...
        try:
            parts = urlsplit(link)
        except ValueError:
            raise UserError("data.path= has :// in it and is no URL.") from None
        token = parts.scheme in ("http", "https") and parts.username
        if parts.password or parts.query or token:
            raise UserError(
                f"data.path={parts.scheme}://{parts.hostname or ''}... holds a password or a signature, which would be "
                "written into every run directory. Give credentials as the protocol takes them: ~/.netrc, AWS_PROFILE, "
                "HF_TOKEN."
            )


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _filesystem(url: str) -> tuple[Any, str]:
    """Returns fsspec's filesystem of a URL, and the path there."""
    import fsspec  # slow to import, and needed by remote shards alone

    options = {}
    if url.startswith("http"):
        import aiohttp

        # its own limit is on the whole of a transfer, which a large shard on a slow line does not keep
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    return fsspec.core.url_to_fs(url, **options)


def _is_transient(error: BaseException) -> bool:
    """Whether to try again: not where the answer was no, or where the fault is on this side."""
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, UserError)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    denied = getattr(error, "status", None) in DENIED_STATUSES
    return isinstance(error, Exception) and not isinstance(error, lasting) and not full and not denied


def _reason(error: BaseException | None) -> str:
    return str(error) or type(error).__name__
