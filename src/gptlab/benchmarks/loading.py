"""Batches from one process: gptlab's and nanoGPT's way, timed, with the memory that the process then has.

python -m gptlab.benchmarks.loading <what to do, in JSON>
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

WARM_UP = 10  # batches before the clock starts

Pair = tuple[Tensor, Tensor]


class Loading(FrozenConfig):
    """What one process is to load, and whether from a file that the kernel has to read again."""

    way: str
    folder: str
    block_size: int
    micro_batch_size: int
    batches: int
    cold: bool
    seed: int


def gptlab_batches(todo: Loading) -> Callable[[int], Batch]:
    """As a training run without workers gets them."""
    folder = Path(todo.folder)
    manifest = load_manifest(folder)
    stream = TokenStream(LocalFolder(folder), manifest, "train")
    order = WindowOrder([len(stream)], todo.block_size, todo.seed, manifest.fingerprint(), "shuffled", 1, None)
    return TrainBatches(stream, order, RankSlice(0, 1, todo.micro_batch_size)).__getitem__


def plain_batches(todo: Loading) -> Callable[[int], Pair]:
    """As nanoGPT's train.py gets them: the file mapped anew for every batch, windows drawn with replacement."""
    path, size = first_shard(todo), todo.block_size
    torch.manual_seed(todo.seed)

    def batch(_: int) -> Pair:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - size, (todo.micro_batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + size].astype(np.int64)) for i in starts])
        return x, y

    return batch


def drop_page_cache(path: Path) -> None:
    """Let the kernel drop what it keeps of a file in memory, where it can be told to."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_page_cache(folder: Path) -> None:
    """Have the kernel keep all of a corpus in memory, some of which it may have dropped since it was written."""
    for shard in load_manifest(folder).splits["train"]:
        with (folder / shard.file).open("rb") as file:
            while file.read(2**24):
                pass


def first_shard(todo: Loading) -> Path:
    """Find the file of tokens that nanoGPT's way reads: it reads one."""
    return Path(todo.folder, load_manifest(Path(todo.folder)).splits["train"][0].file)


def resident_mb() -> float | None:
    """Memory that this process has, with the pages of files that it maps; None where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def main(todo: Loading) -> None:
    """Load, and print the measures."""
    if todo.cold:
        drop_page_cache(first_shard(todo))
    else:
        fill_page_cache(Path(todo.folder))
    batch = gptlab_batches(todo) if todo.way == "gptlab" else plain_batches(todo)
    for number in range(WARM_UP):
        batch(number)
    before, begun = resident_mb(), time.perf_counter()
    for number in range(WARM_UP, WARM_UP + todo.batches):
        batch(number)
    seconds, after = time.perf_counter() - begun, resident_mb()
    tokens = todo.batches * todo.micro_batch_size * todo.block_size
    memory = {} if before is None or after is None else {"resident MB": after, "grown by MB": after - before}
    print(json.dumps({"million tokens/s": tokens / seconds / 1e6} | memory))


if __name__ == "__main__":
    main(Loading.model_validate_json(sys.argv[1]))
