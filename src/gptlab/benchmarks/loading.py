"""Times batches in one process, by gptlab's and nanoGPT's way, and measures its memory.

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
    """What one process loads, and whether from a file that is not in the page cache."""

    way: str
    folder: str
    block_size: int
    micro_batch_size: int
    batches: int
    cold: bool
    seed: int


def gptlab_batches(todo: Loading) -> Callable[[int], Batch]:
    """Returns batches as a training run without workers gets them."""
    folder = Path(todo.folder)
    manifest = load_manifest(folder)
    stream = TokenStream(LocalFolder(folder), manifest, "train")
    order = WindowOrder([len(stream)], todo.block_size, todo.seed, manifest.fingerprint(), "shuffled", 1, None)
    return TrainBatches(stream, order, RankSlice(0, 1, todo.micro_batch_size)).__getitem__


def plain_batches(todo: Loading) -> Callable[[int], Pair]:
    """Returns batches as nanoGPT's train.py gets them: the file mapped for every batch, windows with replacement."""
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
    """Removes a file from the page cache, where the system supports it."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_page_cache(folder: Path) -> None:
    """Reads all of a corpus into the page cache."""
    for shard in load_manifest(folder).splits["train"]:
        with (folder / shard.file).open("rb") as file:
            while file.read(2**24):
                pass


def first_shard(todo: Loading) -> Path:
    """Returns the one file of tokens that nanoGPT's way reads."""
    return Path(todo.folder, load_manifest(Path(todo.folder)).splits["train"][0].file)


def resident_mb() -> float | None:
    """Returns the resident memory of this process, with the pages of mapped files; None if there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def main(todo: Loading) -> None:
    """Loads batches, and prints the measurements as JSON."""
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
