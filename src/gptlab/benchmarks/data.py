"""suite=data: a corpus to shards, and batches from shards."""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from gptlab.benchmarks.config import LoaderBench, PreparationBench
from gptlab.benchmarks.corpus import TextCorpus, text_corpus
from gptlab.benchmarks.measuring import ResultTable, Sample, TimedRun, Variant, measure_in_turns, run_timed
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.manifest import FORMAT, Manifest, Shard, load_manifest
from gptlab.errors import UserError

ROOM = 12  # bytes of disk for a byte of text: the corpus, and all that the plain way keeps of it on the way
CORES = PrepareOptions().workers

# gptlab.prepare as it runs where gigatoken is not installed: a module that is None is one that is not found
WITHOUT_GIGATOKEN = """
import runpy, sys
if __name__ == "__main__":
    sys.modules["gigatoken"] = None
    runpy.run_module("gptlab.prepare", run_name="__main__", alter_sys=True)
"""


def measure(cache: Path, preparation: PreparationBench, loader: LoaderBench, rounds: int) -> Iterator[ResultTable]:
    """Returns an iterator that measures one part after the other.

    Raises:
        UserError: At once, if the disk has no room.
    """
    return _parts(_make_folder(cache, preparation.corpus_mb), preparation, loader, rounds)


def _make_folder(cache: Path, megabytes: int) -> Path:
    """Creates the folder where corpora are kept."""
    kept = cache / "bench"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(kept).free
    except OSError as error:
        raise UserError(f"cache_dir={cache} cannot be used: {error}.") from error
    if free < (needed := ROOM * megabytes * 10**6):
        raise UserError(
            f"{kept} has {free / 1e9:,.1f} GB free and preparation.corpus_mb={megabytes} needs {needed / 1e9:,.1f}: "
            "make room, or name another cache_dir or a smaller corpus."
        )
    return kept


def _parts(folder: Path, preparation: PreparationBench, loader: LoaderBench, rounds: int) -> Iterator[ResultTable]:
    with TemporaryDirectory(dir=folder, prefix="work-") as work_name:
        work = Path(work_name)
        bench = _Preparation(text_corpus(folder, preparation.corpus_mb), preparation.val_fraction, work)
        yield bench.part(rounds)
        yield _loading(loader, bench.prepared, _many_tokens(work / "many", loader.many_tokens), rounds)


class _Preparation:
    """Prepares one corpus in several ways: whole commands, in processes and folders of their own."""

    def __init__(self, corpus: TextCorpus, val_fraction: float, work: Path) -> None:
        self.corpus, self.val_fraction, self.work = corpus, val_fraction, work
        self.prepared = work / "prepared"

    def part(self, rounds: int) -> ResultTable:
        """Measures all ways that are installed."""
        path, total, documents, distinct = self.corpus
        repeated = "" if distinct == total else f" (of which {distinct / 1e6:,.0f} MB differ: the rest repeats them)"
        caption = (
            f"{total / 1e6:,.1f} MB of text{repeated} in {documents:,} documents, {path}. Whole commands, start-up "
            f"included, with {CORES} processes each; inside: without the start of Python and its imports. "
            "nanoGPT's way: datasets.map over tiktoken, then a file of tokens."
        )
        ways = [Variant("", "nanoGPT's way", self.plain), Variant("", "gptlab, tiktoken", self.without_gigatoken)]
        if importlib.util.find_spec("gigatoken"):
            ways.append(Variant("", "gptlab, gigatoken", self.with_gigatoken))
        rows = measure_in_turns(ways, rounds)
        return ResultTable("Preparation: text to GPT-2's tokens", caption, "MB/s", ("seconds", "inside"), rows)

    def plain(self, _: int) -> Sample:
        """Prepares by datasets' map, with nothing in its cache."""
        module, folder = "gptlab.benchmarks.plain", self.work / "plain"
        environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        arguments = (str(self.corpus.path), str(folder), str(self.val_fraction), str(CORES))
        folder.mkdir()
        run = run_timed("-m", module, *arguments, environment=environment)
        start = run_timed("-c", f"import {module}", environment=environment)
        shutil.rmtree(folder)
        return self._sample(run, start, sum(json.loads(run.printed.splitlines()[-1]).values()))

    def without_gigatoken(self, _: int) -> Sample:
        """Prepares as if gigatoken were not installed."""
        return self._gptlab("-c", WITHOUT_GIGATOKEN)

    def with_gigatoken(self, _: int) -> Sample:
        """Prepares with gigatoken."""
        return self._gptlab("-m", "gptlab.prepare")

    def _gptlab(self, *program: str) -> Sample:
        shutil.rmtree(self.prepared, ignore_errors=True)
        cache = self.work / "gptlab"
        run = run_timed(
            *program,
            *("data=text", f"data.source='{self.corpus.path}'", "data.column=text", "tokenizer=gpt2"),
            *("data.val_split=documents", f"data.val_fraction={self.val_fraction}", f"data.cache_dir='{cache}'"),
        )
        (folder,) = (path.parent for path in cache.glob("*/manifest.json"))
        folder.rename(self.prepared)
        shutil.rmtree(cache)
        start = run_timed("-c", "import gptlab.prepare")
        manifest = load_manifest(self.prepared)
        return self._sample(run, start, manifest.tokens("train") + manifest.tokens("val"))

    def _sample(self, run: TimedRun, start: TimedRun, tokens: int) -> Sample:
        return {
            "MB/s": self.corpus.bytes / 1e6 / run.seconds,
            "seconds": run.seconds,
            "inside": run.seconds - start.seconds,
            "tokens": tokens,
        }


def _many_tokens(folder: Path, tokens: int) -> Path:
    """Creates a folder of one shard with so many tokens, all 0: a sparse file, which takes no room."""
    folder.mkdir()
    file = folder / "train_000000.bin"
    try:
        file.touch()
        os.truncate(file, tokens * np.dtype("uint16").itemsize)
    except OSError as error:
        raise UserError(f"{file} cannot have loader.many_tokens={tokens:,} tokens: {error}.") from error
    digest = hashlib.sha256(str(tokens).encode()).hexdigest()
    shard = Shard(file=file.name, tokens=tokens, bytes=tokens, documents=1, sha256=digest)
    Manifest(
        format=FORMAT,
        origin="nothing",
        tokenizer={"name": "gpt2"},
        vocab_size=50257,
        dtype="uint16",
        splits={"train": [shard], "val": []},
    ).save(folder)
    return folder


def _loading(config: LoaderBench, prepared: Path, many: Path, rounds: int) -> ResultTable:
    """Measures batches from a small corpus and from a large one."""

    def way(name: str, folder: Path, size: int) -> Variant:
        tokens, cold = load_manifest(folder).tokens("train"), folder == many
        todo = {"way": name, "folder": str(folder), "micro_batch_size": size, "cold": cold} | shape

        def run(number: int) -> Sample:
            values = json.dumps(todo | {"seed": number})
            return json.loads(run_timed("-m", "gptlab.benchmarks.loading", values).printed)

        where = "cold" if cold else "warm"
        return Variant(f"batch {size}, {tokens:,} tokens, {where}", name, run)

    shape = {"block_size": config.block_size, "batches": config.batches}
    ways = [
        way(name, folder, size)
        for folder in (prepared, many)
        for size in config.micro_batch_sizes
        for name in ("nanoGPT's way", "gptlab")
    ]
    caption = (
        f"{config.batches:,} batches of windows of {config.block_size:,} tokens in shuffled order, in a fresh process "
        "without workers; the larger file is sparse, and cold: the kernel forgets it before each. Memory is that "
        "of the process after them, pages of mapped files included."
    )
    rows = measure_in_turns(ways, rounds)
    return ResultTable("Loader: shards to batches", caption, "million tokens/s", ("resident MB",), rows)
