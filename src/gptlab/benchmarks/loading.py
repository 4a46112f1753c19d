"""Loads batches with gptlab or as nanoGPT does, and measures the speed and memory of the process.

python -m gptlab.benchmarks.loading <task as JSON>
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptlab.config.base import FrozenConfig
from gptlab.data.batches import Batch, RankSlice, TrainBatches
from gptlab.data.order import WindowOrder
from gptlab.data.shards.manifest import load_manifest
from gptlab.data.shards.streams import LocalFolder, TokenStream

WARM_UP = 10  # batches that are not timed

Pair = tuple[Tensor, Tensor]


class Loading(FrozenConfig):
    """Task of one process; ``cold`` removes the file from the page cache first."""

    loader: str
    folder: str
    block_size: int
    micro_batch_size: int
    batches: int
    cold: bool
    seed: int


def gptlab_batches(task: Loading) -> Callable[[int], Batch]:
    """Returns a function that loads a batch as a training run without data loader workers does."""
    folder = Path(task.folder)
    manifest = load_manifest(folder)
    stream = TokenStream(LocalFolder(folder), manifest, "train")
    order = WindowOrder([len(stream)], task.block_size, task.seed, manifest.fingerprint(), "shuffled", 1, None)
    return TrainBatches(stream, order, RankSlice(0, 1, task.micro_batch_size)).__getitem__


def plain_batches(task: Loading) -> Callable[[int], Pair]:
    """Returns a function that loads a batch as nanoGPT's train.py does, with random windows of a mapped file."""
    path, size = first_shard(task), task.block_size
    torch.manual_seed(task.seed)

    def batch(_: int) -> Pair:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - size, (task.micro_batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + size].astype(np.int64)) for i in starts])
        return x, y

    return batch


def drop_page_cache(path: Path) -> None:
    """Removes a file from the page cache, if the operating system supports it."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_page_cache(folder: Path) -> None:
    """Reads the training split of a corpus into the page cache."""
    for shard in load_manifest(folder).splits["train"]:
        with (folder / shard.file).open("rb") as file:
            while file.read(2**24):
                pass


def first_shard(task: Loading) -> Path:
    """Returns the path of the first shard of the training split."""
    return Path(task.folder, load_manifest(Path(task.folder)).splits["train"][0].file)


def resident_mb() -> float | None:
    """Returns the resident memory of this process, including mapped files, in MB, or None without /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def main(task: Loading) -> None:
    """Loads batches and prints the measurements as JSON."""
    if task.cold:
        drop_page_cache(first_shard(task))
    else:
        fill_page_cache(Path(task.folder))
    batch = gptlab_batches(task) if task.loader == "gptlab" else plain_batches(task)
    for number in range(WARM_UP):
        batch(number)
    before, start = resident_mb(), time.perf_counter()
    for number in range(WARM_UP, WARM_UP + task.batches):
        batch(number)
    seconds, after = time.perf_counter() - start, resident_mb()
    tokens = task.batches * task.micro_batch_size * task.block_size
    memory = {} if before is None or after is None else {"resident MB": after, "grown by MB": after - before}
    print(json.dumps({"million tokens/s": tokens / seconds / 1e6} | memory))


if __name__ == "__main__":
    main(Loading.model_validate_json(sys.argv[1]))
