"""Tasks of a preparation: each is tokenized into its own shards, by several worker processes."""

import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gptlab.data.config import DataConfig
from gptlab.data.prepare.splitting import split_document
from gptlab.data.shards.manifest import SPLITS, ShardWriter
from gptlab.data.sources.files import Corpus, Task
from gptlab.data.tokenizers.bulk import Encode, bulk_encoder
from gptlab.data.tokenizers.tokenizer import Tokenizer, rebuild_tokenizer
from gptlab.files import write_durably

FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()


def usable_cores() -> int:
    """Returns the number of cores that this process may use; on macOS, all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PrepareOptions(NamedTuple):
    """Number of worker processes and machines for data preparation, and a progress callback.

    Attributes:
        workers: Number of worker processes. The result does not depend on it.
        part: Index of this machine among the ``parts`` machines that share the tasks.
        parts: Number of machines that share the tasks.
        report: Callback with (bytes done, total bytes, tokens done), called at the start and after every task.
    """

    workers: int = usable_cores()
    part: int = 0
    parts: int = 1
    report: Callable[[int, int, int], None] = lambda done, of, tokens: None


def preload_workers(work: PrepareOptions, tasks: list[Task]) -> None:
    """Starts the fork server, which imports the modules of the workers while this process continues."""
    if min(work.workers, len(tasks)) > 1 and FORKSERVER:
        forkserver.set_forkserver_preload(_modules_to_preload())
        forkserver.ensure_running()


@contextmanager
def start_workers(
    work: PrepareOptions, tasks: list[Task], tokenizer: Tokenizer, vocab_dir: str | None
) -> Iterator[Executor | None]:
    """Starts worker processes, which load the tokenizer. Yields their pool, or None if one process is enough."""
    number = min(work.workers, len(tasks))
    if number <= 1:
        yield None
        return
    context = multiprocessing.get_context("forkserver" if FORKSERVER else "spawn")
    life_end, parent_end = context.Pipe(duplex=False)
    initargs = (life_end, json.dumps(tokenizer.record()), vocab_dir)
    with parent_end, ProcessPoolExecutor(number, context, initializer=_init_worker, initargs=initargs) as pool:
        try:
            # The pool starts a process only when a job is submitted, and the submitting thread waits for the start.
            threading.Thread(target=lambda: [pool.submit(os.getpid) for _ in range(number)]).start()
            yield pool
        except Exception:
            pool.shutdown(wait=True, cancel_futures=True)  # running tasks finish or delete their files
            raise
        except BaseException:  # an interrupt does not wait for running tasks, which are repeated later
            pool.shutdown(wait=False, cancel_futures=True)
            parent_end.close()
            raise


def _modules_to_preload() -> list[str]:
    """Returns the modules to preload: those of the tasks, and all gptlab modules that the main program has imported.

    A worker imports the main program again (see the programming guidelines of multiprocessing). If the main program has
    imported torch, only this module is preloaded, because no task needs torch.
    """
    imported = [name for name in sys.modules if name.startswith("gptlab.")]
    return [__name__] if "torch" in sys.modules else imported


def _init_worker(life: Connection, record: str, vocab_dir: str | None) -> None:
    """Ignores Ctrl-C, which the parent handles, and exits when the parent closes its end of ``life`` or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        life.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _cached_tokenizer(record, vocab_dir)


def run_tasks(
    work_on: Callable[[Task], int],
    tasks: list[Task],
    total: int,
    tokens: int,
    work: PrepareOptions,
    pool: Executor | None,
) -> None:
    """Runs the remaining tasks and reports the progress after each.

    Args:
        work_on: Runs one task and returns its number of tokens.
        tasks: The remaining tasks.
        total: Bytes of the remaining tasks and of those that are already done.
        tokens: Tokens of the tasks that are already done.
        work: Options with the progress callback.
        pool: Worker pool from ``start_workers``. None runs the tasks in this process.
    """
    done = total - sum(task.bytes for task in tasks)
    work.report(done, total, tokens)
    if pool is None:
        for task in tasks:
            tokens, done = tokens + work_on(task), done + task.bytes
            work.report(done, total, tokens)
        return
    futures: dict[Future[int], Task] = {pool.submit(work_on, task): task for task in tasks}
    for future in as_completed(futures):
        tokens, done = tokens + future.result(), done + futures[future].bytes
        work.report(done, total, tokens)


def run_task(
    folder: Path,
    corpus: Corpus,
    config: DataConfig,
    record: dict[str, Any],
    vocab_dir: str | None,
    fast: bool,
    threshold: float | None,
    task: Task,
) -> int:
    """Tokenizes one task into its shards, writes its record, and returns its number of tokens.

    Args:
        folder: Directory of the shards.
        corpus: The corpus.
        config: Config of the data, with a resolved ``val_split``.
        record: Record of the tokenizer.
        vocab_dir: Directory of GPT-2's vocabulary, or None.
        fast: Whether to encode with the bulk encoder.
        threshold: Result of ``val_threshold``.
        task: The task.
    """
    tokenizer, bulk = _cached_tokenizer(json.dumps(record), vocab_dir)
    encode = bulk if fast and bulk else tokenizer.encode
    ends = [] if tokenizer.end_of_text is None else [np.uint32(tokenizer.end_of_text)]
    writers = {s: ShardWriter(folder / f"{s}_{task.number:06d}.bin", token_dtype(tokenizer)) for s in SPLITS}
    try:
        for document in corpus.documents(task):
            num_replaced = int(document.has_replacements)  # counted once
            for split, text, begins, finishes, is_last in split_document(document, config, threshold):
                if not text:
                    continue
                ids = encode(text)
                if ends and (begins if config.separator == "before" else finishes):
                    ids = np.concatenate((ends, ids) if config.separator == "before" else (ids, ends))
                writers[split].add(ids, len(text.encode()), int(is_last), num_replaced)
                num_replaced = 0
        shards = {split: writer.finish() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    content = {split: [shard.model_dump() for shard in shards[split]] for split in SPLITS}
    write_durably(record_path(folder, task), json.dumps(content | {"threshold": threshold}))
    return sum(writer.tokens for writer in writers.values())


@functools.lru_cache(maxsize=1)
def _cached_tokenizer(record: str, vocab_dir: str | None) -> tuple[Tokenizer, Encode | None]:
    """Returns the tokenizer and its bulk encoder, if there is one. Caches them for the next task of the process."""
    tokenizer = rebuild_tokenizer(json.loads(record), vocab_dir)
    return tokenizer, bulk_encoder(tokenizer)


def token_dtype(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    """Returns the dtype of the shards: uint16 if all token IDs fit, otherwise uint32."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def record_path(folder: Path, task: Task) -> Path:
    """Returns the path of the record of a task, which is written after its shards."""
    return folder / f"task_{task.number:06d}.json"
