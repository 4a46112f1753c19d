"""Prepared data: shards, what they hold, and whether they are still what was written."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from gptlab.data.shards.manifest import Manifest, Shard, Split, write_durably
from gptlab.data.shards.streams import LocalFolder, ShardStore, TokenStream
from gptlab.data.tokenizers.tokenizer import Tokenizer
from gptlab.errors import UserError

log = logging.getLogger(__name__)

MANY = 10**9  # tokens whose hashing takes seconds, and is told


class TokenDataset(NamedTuple):
    """Shards, what they hold, and their tokenizer."""

    store: ShardStore
    manifest: Manifest
    tokenizer: Tokenizer

    @property
    def folder(self) -> Path:
        """Where the shards are, or are kept while they are used."""
        return self.store.folder

    def stream(self, split: Split) -> TokenStream:
        """The tokens of one split."""
        return TokenStream(self.store, self.manifest, split)


def verify_shards(store: ShardStore, shards: Sequence[Shard]) -> int:
    """Hash shards again; return their number. UserError names the first whose tokens are not what was written."""
    for shard in shards:
        with store.open(shard) as file:
            file.seek(shard.offset)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise UserError(
                f"{store.folder / shard.file} is not what was written: its SHA-256 is {found}, not {shard.sha256}."
            )
    return len(shards)


def check_unchanged(folder: Path, manifest: Manifest, cache_dir: Path) -> None:
    """Hash the shards of ``folder`` that are new on this machine, or were touched since they were last hashed.

    What was hashed is remembered by size, times and inode, so that data that nobody touched costs nothing.

    Raises:
        UserError: The tokens of a shard are not what was written.
    """
    memory = _verified_file(folder, cache_dir)
    with FileLock(f"{memory}.lock"):
        known = _read_verified(memory)
        now = _file_states(folder, manifest)
        touched = [shard for shard in manifest.shards() if known.get(shard.file) != now[shard.file]]
        if touched:
            if (size := sum(shard.tokens for shard in touched)) > MANY:
                log.info("Hashing %d shards of %s, once: %s tokens.", len(touched), folder, f"{size:,}")
            verify_shards(LocalFolder(folder), touched)
            write_durably(memory, json.dumps(now))


def record_verified(folder: Path, manifest: Manifest, cache_dir: Path) -> None:
    """Remember shards as they are now: they have just been hashed, as they were written or read."""
    memory = _verified_file(folder, cache_dir)
    with FileLock(f"{memory}.lock"):
        write_durably(memory, json.dumps(_file_states(folder, manifest)))


def _verified_file(folder: Path, cache_dir: Path) -> Path:
    """Name the file that says what was hashed in ``folder``."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    memory = cache_dir / "verified" / f"{name}.json"
    memory.parent.mkdir(parents=True, exist_ok=True)
    return memory


def _file_states(folder: Path, manifest: Manifest) -> dict[str, list[object]]:
    """What changes when a shard's file is touched, and what its hash should be."""
    stats = ((shard, (folder / shard.file).stat()) for shard in manifest.shards())
    return {
        shard.file: [shard.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        for shard, stat in stats
    }


def _read_verified(memory: Path) -> dict[str, object]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
