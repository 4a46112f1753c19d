"""Remote shards, prefetched into a local cache directory of limited size. Imports no torch.

All processes of a machine share the directory. A shard gets its final name only after its SHA-256 is verified, the
process that downloads it holds its lock, and the least recently used shards are evicted.
"""

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
from gptlab.files import is_disk_full, temporary_path

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 8  # download attempts per file, which take about two minutes
FIRST_ATTEMPTS = 4  # of the manifest or the list of files, which take about ten seconds: the URL may be wrong
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between attempts, doubled after each attempt
DENIED_STATUSES = (401, 403)  # HTTP status codes that are not retried
READ_TIMEOUT = 60.0  # seconds without data after which a connection is broken


class RemoteFolder:
    """Prepared directory at any URL that fsspec supports: s3://, gs://, hf://, https://, file://.

    Args:
        url: URL of the directory. It must not contain credentials; they are read from the environment.
        cache_dir: Cache directory. The shards are stored in a subdirectory of it.
        limit: Maximum total size of the cached shards, in bytes.
        key: Config key that contains the URL. Used in error messages.

    Raises:
        UserError: The URL contains a password or cannot be opened, its manifest is missing or invalid, or the manifest
            names files in other directories.
    """

    def __init__(self, url: str, cache_dir: Path, limit: float, key: str = "data.path") -> None:
        _check_no_secret(url, key)
        self.url, self.limit = url.rstrip("/"), limit
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MANIFEST
            self._get(MANIFEST, path, temporary_path(path))
            try:
                self.manifest = load_manifest(Path(folder))
            except UserError as error:
                raise UserError(f"{self.url} does not contain prepared data: {error}") from None
        self.sizes = {shard.file: self.manifest.file_size(shard) for shard in self.manifest.shards()}
        if elsewhere := [name for name in self.sizes if Path(name).name != name or Path(name).suffix not in SUFFIXES]:
            raise UserError(
                f"{self.url}/{MANIFEST} names {elsewhere[0]}, which is not in the same directory, because it describes "
                "token files on another machine. Convert them with python -m gptlab.prepare convert=..., or prepare "
                "the data again on that machine."
            )
        # Named by content: identical data at two URLs is cached once, and different data never shares a directory. The
        # fingerprint is not used, because it does not depend on the file names.
        content = self.manifest.model_dump_json().encode()
        self.folder = cache_dir / f"remote-{hashlib.sha256(content).hexdigest()[:12]}"
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        self.manifest.save(self.folder)
        self._ahead: queue.Queue[Sequence[Shard]] = queue.Queue()
        self._fetcher = 0  # ID of the process that started the prefetch thread

    def __getstate__(self) -> dict[str, Any]:
        """Omits the queue and the thread, which each worker process creates for itself."""
        return {**self.__dict__, "_ahead": None, "_fetcher": 0}

    def open(self, shard: Shard) -> FileIO:
        """Opens a shard's file, and downloads it first if it is not cached.

        Raises:
            UserError: The file cannot be downloaded, or its size or SHA-256 differs from the manifest.
        """
        with self._lock(shard.file):
            return self._present(shard).open("rb", buffering=0)

    def check_room(self, shards: Sequence[Shard]) -> None:
        """Raises UserError if ``shards``, which are in use at the same time, exceed the cache limit."""
        needed = sum({shard.file: self.sizes[shard.file] for shard in shards}.values())
        if needed > self.limit:
            raise UserError(
                f"data.cache_limit_gb={self.limit / 1e9:g} is less than the {needed / 1e9:.3g} GB of {self.url} that "
                "are in use at the same time, so shards would be downloaded repeatedly. Increase the limit, or "
                "use fewer shards at a time with data.order=block and a smaller data.block_shards."
            )

    def expect(self, shards: Sequence[Shard]) -> None:
        """Downloads shards in the background, in order."""
        if self._fetcher != os.getpid():  # first call in this process, which may be a forked worker
            self._fetcher, self._ahead = os.getpid(), queue.Queue()
            threading.Thread(target=self._fetch_ahead, daemon=True).start()
        self._ahead.put(shards)

    def _fetch_ahead(self) -> None:
        while True:
            for shard in self._ahead.get():
                if not self._ahead.empty():
                    break  # a later call expects other shards
                try:
                    with self._lock(shard.file).acquire(blocking=False):
                        self._present(shard)
                except Timeout:
                    continue  # another process downloads it
                except (UserError, OSError) as error:
                    log.warning("Prefetching failed: %s", error)  # reading the shard tries again and raises the error

    def _present(self, shard: Shard) -> Path:
        """Returns the path of a shard's verified file, downloaded if necessary. The caller holds its lock."""
        path = self.folder / shard.file
        if not path.exists():
            for stale in self.folder.glob(f".{glob.escape(shard.file)}.*"):  # left by a process that was killed
                stale.unlink(missing_ok=True)
            unfinished = self._make_room(shard)
            log.info("Downloading %s/%s (%.1f MB).", self.url, shard.file, self.sizes[shard.file] / 1e6)
            self._get(shard.file, path, unfinished, shard)
        os.utime(path)  # marks it as the most recently used
        return path

    def _get(self, name: str, path: Path, unfinished: Path, shard: Shard | None = None) -> None:
        """Downloads a file, verifies it, and renames it to its final name."""
        wrong = set[str]()
        attempts = MAX_ATTEMPTS if shard else min(FIRST_ATTEMPTS, MAX_ATTEMPTS)
        _fetch_to(path, unfinished, f"{self.url}/{name}", lambda: self._fetch(name, unfinished, shard, wrong), attempts)

    def _fetch(self, name: str, path: Path, shard: Shard | None, wrong: set[str]) -> None:
        """Downloads a file, without retries. If a wrong hash is already in ``wrong``, the error is not transient."""
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
            raise kind(f"the downloaded file has the SHA-256 {found}, not {shard.sha256}")

    def _make_room(self, shard: Shard) -> Path:
        """Evicts the least recently used shards until ``shard`` fits; returns a new file, which reserves its space."""
        with self._lock("room"):
            cached = sorted(
                (path for name in self.sizes if (path := self.folder / name).exists()),
                key=lambda path: path.stat().st_mtime,
            )
            unfinished = {path.name[1:].rpartition(".")[0] for path in self.folder.glob(".*.*")}
            used = sum(self.sizes[path.name] for path in cached) + sum(self.sizes.get(name, 0) for name in unfinished)
            used += self.sizes[shard.file]
            for path in cached:
                if used <= self.limit:
                    break
                try:
                    with self._lock(path.name).acquire(blocking=False):
                        path.unlink(missing_ok=True)  # processes that have it open can still read it
                        used -= self.sizes[path.name]
                except Timeout:
                    continue  # another process is opening it
            return _reserve(self.folder / shard.file)

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / name)


def fetch_files(pattern: str, cache_dir: Path, key: str = "data.path") -> Path:
    """Downloads all token files that match a URL with wildcards, and returns their directory.

    Only the sizes of the files are checked, because their SHA-256 is unknown.

    Args:
        pattern: URL with wildcards. It must not contain credentials; they are read from the environment.
        cache_dir: Cache directory. The files are stored in a subdirectory of it.
        key: Config key that contains the URL. Used in error messages.

    Raises:
        UserError: The URL contains a password or matches nothing, or a file cannot be downloaded.
    """
    _check_no_secret(pattern, key)
    folder = cache_dir / f"files-{hashlib.sha256(pattern.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}

    def list_matches() -> None:
        filesystem, path = _filesystem(pattern)
        found.update(filesystem.glob(path, detail=True))

    def fetch(remote_path: str, unfinished: Path) -> None:
        filesystem, _ = _filesystem(pattern)
        filesystem.get_file(remote_path, str(unfinished))
        _check_size(unfinished, filesystem.size(remote_path))

    with FileLock(f"{folder}{LOCK}"):
        _with_retries(pattern, list_matches, min(FIRST_ATTEMPTS, MAX_ATTEMPTS))
        for remote_path, info in sorted(found.items()):
            path = folder / PurePosixPath(remote_path).name
            if info["type"] == "file" and not path.exists():
                log.info("Downloading %s.", remote_path)
                unfinished = _reserve(path)
                download = functools.partial(fetch, remote_path, unfinished)
                _fetch_to(path, unfinished, remote_path, download, MAX_ATTEMPTS)
    if not any(folder.iterdir()):
        raise UserError(f"{key}={pattern} matches nothing.")
    return folder


def _fetch_to(path: Path, unfinished: Path, source: str, fetch: Callable[[], None], attempts: int) -> None:
    """Downloads a file as ``unfinished``, and renames it when it is complete."""
    try:
        _with_retries(source, fetch, attempts)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_size(path: Path, expected: int) -> None:
    if (size := path.stat().st_size) != expected:
        raise OSError(f"received {size:,} of {expected:,} bytes")


def _with_retries(source: str, fetch: Callable[[], None], most: int) -> None:
    """Calls ``fetch`` at most ``most`` times: retries transient errors with exponential backoff."""
    import tenacity  # only needed for remote shards

    def log_retry(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None  # noqa: S101, PT018
        log.warning(
            "%s: %s. Retrying (attempt %d of %d) in %.0f s.",
            *(source, _reason(state.outcome.exception())),
            *(state.attempt_number + 1, most, state.next_action.sleep),
        )

    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(most),
        wait=tenacity.wait_exponential(FIRST_WAIT, LONGEST_WAIT) + tenacity.wait_random(0, FIRST_WAIT),
        retry=tenacity.retry_if_exception(_is_transient),
        before_sleep=log_retry,
        reraise=True,
    )
    try:
        attempts(fetch)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist.") from None
    except Exception as error:
        raise UserError(f"{source} could not be downloaded: {_reason(error)}.") from error


def _check_no_secret(url: str, key: str) -> None:
    for link in url.split("::"):  # URLs can be chained, as in simplecache::https://...
        try:
            parts = urlsplit(link)
        except ValueError:
            raise UserError(f"{key} contains :// but is not a valid URL.") from None
        token = parts.scheme in ("http", "https") and parts.username
        if parts.password or parts.query or token:
            raise UserError(
                f"{key}={parts.scheme}://{parts.hostname or ''}... contains a password, token or signature, which "
                "would be written to every run directory. Provide credentials as usual for the protocol, for example "
                "with ~/.netrc, AWS_PROFILE or HF_TOKEN."
            )


def _reserve(path: Path) -> Path:
    """Creates an empty temporary file in the same directory and returns its path."""
    unfinished = temporary_path(path)
    unfinished.touch(exist_ok=False)
    return unfinished


def _filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec filesystem of a URL and the path in that filesystem."""
    import fsspec  # slow to import and only needed for remote shards

    options = {}
    if url.startswith("http"):
        import aiohttp

        # The default limits the total time of a transfer, which a large shard on a slow connection exceeds.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    return fsspec.core.url_to_fs(url, **options)


def _is_transient(error: BaseException) -> bool:
    """Returns whether to retry after ``error``: not if access was denied or the cause is on this machine."""
    permanent = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, UserError)
    denied = getattr(error, "status", None) in DENIED_STATUSES
    return isinstance(error, Exception) and not isinstance(error, permanent) and not is_disk_full(error) and not denied


def _reason(error: BaseException | None) -> str:
    return str(error) or type(error).__name__
