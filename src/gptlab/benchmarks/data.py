"""suite=data: preparation of a corpus into shards, and loading of batches from shards."""

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
from gptlab.errors import UserError, failure_reason

ROOM = 12  # bytes of disk space per byte of text: the corpus, and the intermediate files of datasets.map
CORES = PrepareOptions().workers

# runs gptlab.prepare as if gigatoken were not installed: importing a module that is None in sys.modules fails
WITHOUT_GIGATOKEN = """
import runpy, sys
if __name__ == "__main__":
    sys.modules["gigatoken"] = None
    runpy.run_module("gptlab.prepare", run_name="__main__", alter_sys=True)
"""


def measure(cache: Path, preparation: PreparationBench, loader: LoaderBench, rounds: int) -> Iterator[ResultTable]:
    """Returns an iterator that measures the preparation, then the loader.

    Raises:
        UserError: There is not enough disk space. Raised by this call, not by the iterator.
    """
    return _parts(_make_folder(cache, preparation.corpus_mb), preparation, loader, rounds)


def _make_folder(cache: Path, megabytes: int) -> Path:
    """Creates the cache directory of the corpora; raises UserError if there is not enough disk space."""
    folder = cache / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cache_dir={cache} cannot be used: {failure_reason(error)}.") from error
    if free < (needed := ROOM * megabytes * 10**6):
        raise UserError(
            f"preparation.corpus_mb={megabytes} needs {needed / 1e9:,.1f} GB, but {folder} has {free / 1e9:,.1f} GB "
            "free. Free disk space, or choose another cache_dir or a smaller corpus."
        )
    return folder


def _parts(folder: Path, preparation: PreparationBench, loader: LoaderBench, rounds: int) -> Iterator[ResultTable]:
    with TemporaryDirectory(dir=folder, prefix="work-") as work_name:
        work = Path(work_name)
        bench = _Preparation(text_corpus(folder, preparation.corpus_mb), preparation.val_fraction, work)
        yield bench.part(rounds)
        yield _loading(loader, bench.prepared, _many_tokens(work / "many", loader.many_tokens), rounds)


class _Preparation:
    """Prepares a corpus with several programs, each run as a command in a separate process and directory."""

    def __init__(self, corpus: TextCorpus, val_fraction: float, work: Path) -> None:
        self.corpus, self.val_fraction, self.work = corpus, val_fraction, work
        self.prepared = work / "prepared"

    def part(self, rounds: int) -> ResultTable:
        """Measures all programs that are installed."""
        path, total, documents, distinct = self.corpus
        repeated = "" if distinct == total else f" ({distinct / 1e6:,.0f} MB distinct, repeated)"
        caption = (
            f"{total / 1e6:,.1f} MB of text{repeated} in {documents:,} documents, {path}. Whole commands, with "
            f"{CORES} processes each, including start-up (the start of Python and imports). "
            "nanoGPT: datasets.map with tiktoken, then one file of tokens per split."
        )
        variants = [Variant("", "nanoGPT", self.plain), Variant("", "gptlab, tiktoken", self.without_gigatoken)]
        if importlib.util.find_spec("gigatoken"):
            variants.append(Variant("", "gptlab, gigatoken", self.with_gigatoken))
        rows = measure_in_turns(variants, rounds)
        return ResultTable("Preparation: text to GPT-2 tokens", caption, "MB/s", ("seconds", "inside"), rows)

    def plain(self, _: int) -> Sample:
        """Prepares with datasets.map and an empty cache."""
        module, folder = "gptlab.benchmarks.plain", self.work / "plain"
        environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        arguments = (str(self.corpus.path), str(folder), str(self.val_fraction), str(CORES))
        folder.mkdir()
        run = run_timed("-m", module, *arguments, environment=environment)
        start = run_timed("-c", f"import {module}", environment=environment)
        shutil.rmtree(folder)
        return self._sample(run, start, sum(json.loads(run.printed.splitlines()[-1]).values()))

    def without_gigatoken(self, _: int) -> Sample:
        """Prepares with gptlab as if gigatoken were not installed."""
        return self._gptlab("-c", WITHOUT_GIGATOKEN)

    def with_gigatoken(self, _: int) -> Sample:
        """Prepares with gptlab and gigatoken."""
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
    """Creates a prepared corpus with one shard of ``tokens`` zeros, a sparse file that uses no disk space."""
    folder.mkdir()
    file = folder / "train_000000.bin"
    try:
        file.touch()
        os.truncate(file, tokens * np.dtype("uint16").itemsize)
    except OSError as error:
        raise UserError(
            f"loader.many_tokens={tokens} is too large: {file} cannot be created: {failure_reason(error)}."
        ) from error
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
    """Measures loading of batches from a small and from a large corpus."""

    def variant(name: str, folder: Path, size: int) -> Variant:
        tokens, cold = load_manifest(folder).tokens("train"), folder == many
        task = {"loader": name, "folder": str(folder), "micro_batch_size": size, "cold": cold} | shape

        def run(number: int) -> Sample:
            values = json.dumps(task | {"seed": number})
            return json.loads(run_timed("-m", "gptlab.benchmarks.loading", values).printed)

        cache = "cold" if cold else "warm"
        return Variant(f"micro-batch {size}, {tokens:,} tokens, {cache} page cache", name, run)

    shape = {"block_size": config.block_size, "batches": config.batches}
    variants = [
        variant(name, folder, size)
        for folder in (prepared, many)
        for size in config.micro_batch_sizes
        for name in ("nanoGPT", "gptlab")
    ]
    caption = (
        f"{config.batches:,} batches of windows of {config.block_size:,} tokens in shuffled order, in a new process "
        "without data loader workers. The larger file is sparse and is removed from the page cache before each "
        "measurement. Resident MB: memory of the process at the end, including pages of mapped files."
    )
    rows = measure_in_turns(variants, rounds)
    return ResultTable("Loader: shards to batches", caption, "million tokens/s", ("resident MB",), rows)
