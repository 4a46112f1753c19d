"""Preparation of a corpus as cached token shards. Imports no torch.

The corpus is divided into tasks independently of the number of workers and machines. Each task writes its shards and
then its record. The manifest is written last. A preparation that was killed resumes with the tasks that have no
record, and its result is bit-identical for any number of workers and machines.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from pathlib import Path

from filelock import FileLock

from gptlab.config.components import hash_sources
from gptlab.data.config import BuiltInTokenizerConfig, ComponentTokenizerConfig, DataConfig, TokenizerConfig
from gptlab.data.prepare.splitting import HASH_RANGE, resolve_val_split, val_threshold
from gptlab.data.prepare.tasks import (
    PrepareOptions,
    preload_workers,
    record_path,
    run_task,
    run_tasks,
    start_workers,
    token_dtype,
)
from gptlab.data.shards.manifest import (
    FORMAT,
    LOCK,
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    Split,
    load_manifest,
    load_shards,
)
from gptlab.data.shards.open_shards import ensure_cache_dir, open_shards
from gptlab.data.shards.streams import LocalFolder
from gptlab.data.shards.token_dataset import TokenDataset, check_unchanged, lock_cache, record_verified
from gptlab.data.sources.component import ReaderCorpus, check_reader
from gptlab.data.sources.corpora import open_corpus, tinyshakespeare_path
from gptlab.data.sources.files import Corpus, Task
from gptlab.data.sources.readers import UNDIVIDED
from gptlab.data.tokenizers.bulk import SAMPLE_BYTES, bulk_encoder, is_equivalent, take_characters
from gptlab.data.tokenizers.component import ComponentTokenizer
from gptlab.data.tokenizers.file import FileTokenizer
from gptlab.data.tokenizers.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from gptlab.errors import UserError
from gptlab.files import is_disk_full, write_durably
from gptlab.progress import Advance, track_reading

log = logging.getLogger(__name__)

NUM_TASKS = 64  # a small corpus is divided into this many tasks, so that all cores are used ...
MIN_TASK_BYTES = 2**24  # ... unless the tasks would be smaller than this
MAX_SPLIT_RATIO = 3  # largest ratio of the actual val fraction to data.val_fraction, or its inverse, without a warning
NUM_SAMPLE_TEXTS = 8  # maximum number of texts on which a tokenizer is checked
TOKENIZER_FILE = "tokenizer.json"  # the tokenizer's record, present only while the directory is being prepared


def prepare(
    config: DataConfig,
    tokenizer: TokenizerConfig,
    work: PrepareOptions = PrepareOptions(),  # noqa: B008  (a constant)
    trained: Tokenizer | None = None,
) -> TokenDataset:
    """Returns the prepared data of a config. Prepares it first if it is not cached.

    Concurrent calls on one file system wait for the process that prepares the data.

    Args:
        config: Config of the corpus.
        tokenizer: Config of the tokenizer.
        work: Workers, machines and progress callback.
        trained: Tokenizer that was built from another corpus or is stored. Default: builds the tokenizer of the config.

    Raises:
        UserError: The corpus, the vocabulary or the shards are missing, empty or damaged, the disk is full, or other
            machines have not finished their parts yet.
    """
    cache_dir = Path(config.cache_dir).expanduser()
    if config.source and Path(config.source).expanduser().resolve() in (cache_dir / "data").resolve().parents:
        raise UserError(
            f"data.cache_dir={config.cache_dir} is inside data.source={config.source}, so prepared data would be read "
            "as text next time. Choose a directory outside of data.source."
        )
    if isinstance(tokenizer, BuiltInTokenizerConfig) and tokenizer.name != "bpe" and tokenizer.vocab_size is not None:
        raise UserError(
            f"tokenizer.vocab_size={tokenizer.vocab_size} has no effect with tokenizer={tokenizer.name}. Remove it, or "
            "use tokenizer=bpe."
        )
    if config.corpus == "shards":
        return open_shards(config, tokenizer, trained)
    if config.reader is not None:
        check_reader(config.reader)  # before anything is written
    trained = trained or _given_tokenizer(tokenizer)
    ensure_cache_dir(config)
    corpus, config = _open_corpus(config, trained), resolve_val_split(config)
    folder = _cache_folder(config, tokenizer, corpus, trained)
    # Machines that share a preparation work on different tasks and do not need the lock.
    with lock_cache(Path(f"{folder}{LOCK}")) if work.parts == 1 else nullcontext(True) as is_writable:
        if not is_writable and not (folder / MANIFEST).exists():
            raise UserError(
                f"data.cache_dir={config.cache_dir} is read-only, and {corpus.origin} has not been prepared in it with "
                f"tokenizer={tokenizer.name} and these settings. Set data.cache_dir to a directory of your own."
            )
        if not (folder / MANIFEST).exists():
            _run_preparation(folder, config, tokenizer, corpus, work, trained)
        elif is_writable and (folder / TOKENIZER_FILE).exists():  # killed before the intermediate files were deleted
            _remove_intermediate_files(folder)
    try:
        manifest = load_shards(folder)
        check_unchanged(folder, manifest, cache_dir)
    except UserError as error:
        raise UserError(f"{error} Delete {folder} to prepare the data again.") from error
    if trained is None:
        trained = load_tokenizer(manifest.tokenizer, tokenizer.vocab_dir, folder)
    return TokenDataset(LocalFolder(folder), manifest, trained)


def find_prepared(config: DataConfig, tokenizer: TokenizerConfig) -> Manifest | None:
    """Returns the manifest of prepared data, or None if the data is not prepared yet.

    Writes, hashes and downloads nothing. Returns None for a corpus that would have to be downloaded first.
    """
    if config.corpus == "shards":
        folder = Path(config.path or "").expanduser()
    elif config.corpus == "shakespeare" and not (config.source or tinyshakespeare_path(config.cache_dir).exists()):
        return None
    else:
        trained = _given_tokenizer(tokenizer)
        folder = _cache_folder(resolve_val_split(config), tokenizer, _open_corpus(config, trained), trained)
    return load_manifest(folder) if (folder / MANIFEST).is_file() else None


def _given_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """Builds a component or the tokenizer of a file, which do not depend on the corpus; None for other tokenizers."""
    is_given = isinstance(config, ComponentTokenizerConfig) or config.name == "file"
    return build_tokenizer(config, ()) if is_given else None


def _open_corpus(config: DataConfig, tokenizer: Tokenizer | None) -> Corpus:
    """Opens the corpus. Its texts are not divided if the tokenizer of a file would give the parts other token IDs."""
    whole = isinstance(tokenizer, FileTokenizer) and not tokenizer.can_be_divided
    return open_corpus(config.model_copy(update={"task_bytes": UNDIVIDED}) if whole else config)


def _cache_folder(
    config: DataConfig, tokenizer: TokenizerConfig, corpus: Corpus, trained: Tokenizer | None = None
) -> Path:
    """Returns the cache directory, whose name hashes everything on which its content depends."""
    cut = [config.val_split, config.val_fraction, config.split_seed, config.separator, config.task_bytes]
    if config.val_split == "tail":
        cut.append(config.end_at_cut)
    made: object
    if isinstance(tokenizer, ComponentTokenizerConfig):
        made = [trained.record() if trained else tokenizer.component, hash_sources(tokenizer.component)]
    else:
        made = trained.record() if trained else [tokenizer.name, tokenizer.vocab_size, tokenizer.train_mb]
    key = json.dumps([FORMAT, corpus.fingerprint(), made, cut])
    name = f"{config.corpus}-{tokenizer.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return Path(config.cache_dir).expanduser() / name


def _run_preparation(
    folder: Path,
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    corpus: Corpus,
    work: PrepareOptions,
    trained: Tokenizer | None,
) -> None:
    """Runs the remaining tasks of this machine, then writes the manifest if the tasks of all machines are done."""
    log.info("Preparing %s with tokenizer=%s in %s", corpus.origin, tokenizer_config.name, folder)
    if isinstance(corpus, ReaderCorpus):
        # only one of the machines that share a preparation runs the reader
        with FileLock(f"{folder}{LOCK}") if work.parts > 1 else nullcontext():
            corpus = corpus.store(folder)
    tasks = corpus.tasks(min(config.task_bytes, max(corpus.bytes // NUM_TASKS, MIN_TASK_BYTES)))
    threshold = val_threshold(config, corpus, tasks)
    if threshold not in (None, config.val_fraction * HASH_RANGE):
        _discard_stale_records(folder, tasks, threshold)
    own_tasks = [task for task in tasks if task.number % work.parts == work.part]
    done, todo = _partition_tasks(folder, own_tasks)
    preload_workers(work, todo)
    try:
        folder.mkdir(exist_ok=True)
        tokenizer = trained or _tokenizer(folder, tokenizer_config, corpus, tasks)
        if isinstance(tokenizer, ComponentTokenizer) and not _partition_tasks(folder, tasks)[0]:
            _check_tokenizer(folder, tokenizer, corpus, tasks)
        if done:
            log.info("Resuming: %d of %d tasks are already done.", len(done), len(own_tasks))
        earlier = sum(shard.tokens for shards in _collect_splits(folder, done).values() for shard in shards)
        record, vocab_dir = tokenizer.record(), tokenizer_config.vocab_dir
        with start_workers(work, todo, tokenizer, vocab_dir) as pool:
            fast = bool(todo) and _can_use_bulk_encoder(tokenizer, corpus, tasks)
            work_on = functools.partial(run_task, folder, corpus, config, record, vocab_dir, fast, threshold)
            run_tasks(work_on, todo, sum(task.bytes for task in own_tasks), earlier, work, pool)
        if waiting := _partition_tasks(folder, tasks)[1]:
            raise UserError(
                f"The tasks of prepare.part={work.part} are done, but {len(waiting)} of {len(tasks)} tasks in {folder} "
                f"are not (the first is task {waiting[0].number}). When all parts are done, run with merge=true."
            )
        # Parts that finish at the same time would delete each other's files.
        with FileLock(f"{folder}{LOCK}") if work.parts > 1 else nullcontext():
            if not (folder / MANIFEST).exists():
                manifest = _write_manifest(folder, config, corpus, tasks, tokenizer)
                _warn_of_unequal_split(manifest, config)
                if len(todo) == len(tasks):  # this process has just written and hashed all shards
                    record_verified(folder, manifest, folder.parent)
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, most likely because memory ran out. Use fewer workers or a smaller "
            "data.task_bytes and run the command again. Finished tasks are kept."
        ) from error
    except OSError as error:
        if not is_disk_full(error):
            raise
        left = sum(task.bytes for task in _partition_tasks(folder, own_tasks)[1])
        raise UserError(
            f"The disk of {folder} is full. The remaining tasks need at most about {2 * left / 1e9:.1f} GB more "
            "(several times as much for compressed text). Free disk space and run the command again. Finished tasks "
            "are kept."
        ) from error


def _tokenizer(folder: Path, config: TokenizerConfig, corpus: Corpus, tasks: list[Task]) -> Tokenizer:
    """Builds the tokenizer, or loads it if a preparation is resumed."""
    path = folder / TOKENIZER_FILE
    if path.exists():
        return load_tokenizer(json.loads(path.read_text()), config.vocab_dir, folder)
    if isinstance(config, ComponentTokenizerConfig) or config.train_mb is None:
        texts, size = (document.text for task in tasks for document in corpus.documents(task)), corpus.bytes
    else:
        size = min(round(config.train_mb * 1e6), corpus.bytes)
        texts = (
            text
            for sample in _sample_texts(corpus, tasks)
            for text in take_characters(sample, config.train_mb * 1e6 / len(tasks))
        )
    with track_reading("Building the tokenizer", size) as advance:
        tokenizer = build_tokenizer(config, _counted(texts, advance))
    write_durably(path, json.dumps(tokenizer.record()))
    return tokenizer


def _counted(texts: Iterator[str], advance: Advance) -> Iterator[str]:
    """Yields texts, and reports their number of characters."""
    for text in texts:
        advance(len(text))
        yield text


def _check_tokenizer(folder: Path, tokenizer: ComponentTokenizer, corpus: Corpus, tasks: list[Task]) -> None:
    """Checks a custom tokenizer on a sample of the corpus. Deletes ``folder`` if that fails."""
    samples = _sample_texts(corpus, _spread(tasks))
    try:
        for texts in samples:
            tokenizer.check(take_characters(texts, SAMPLE_BYTES / len(samples)))
        write_durably(folder / TOKENIZER_FILE, json.dumps(tokenizer.record()))
    except BaseException:
        shutil.rmtree(folder)
        raise


def _partition_tasks(folder: Path, tasks: list[Task]) -> tuple[list[Task], list[Task]]:
    """Splits tasks into those that are done and those that are not."""
    done = {task.number for task in tasks if record_path(folder, task).exists()}
    return [task for task in tasks if task.number in done], [task for task in tasks if task.number not in done]


def _discard_stale_records(folder: Path, tasks: list[Task], threshold: float | None) -> None:
    """Deletes the records of tasks that were split with another threshold, so that they are redone."""
    for task in _partition_tasks(folder, tasks)[0]:
        path = record_path(folder, task)
        with suppress(FileNotFoundError):  # another machine has deleted it
            if json.loads(path.read_text()).get("threshold") != threshold:
                path.unlink()


def _collect_splits(folder: Path, tasks: list[Task]) -> dict[Split, list[Shard]]:
    """Returns the shards of each split from the records of ``tasks``."""
    records = [json.loads(record_path(folder, task).read_text()) for task in tasks]
    return {split: [Shard.model_validate(shard) for record in records for shard in record[split]] for split in SPLITS}


def _write_manifest(
    folder: Path, config: DataConfig, corpus: Corpus, tasks: list[Task], tokenizer: Tokenizer
) -> Manifest:
    """Writes the manifest and deletes intermediate files."""
    splits = _collect_splits(folder, tasks)
    for split in SPLITS:
        if not splits[split] and not (split == "train" and config.val_fraction == 1):
            raise UserError(f"{corpus.origin} is empty or too short: the {split} split has no text.")
    manifest = Manifest(
        format=FORMAT,
        origin=corpus.origin,
        tokenizer=tokenizer.record(),
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer),
        splits=splits,
    )
    manifest.save(folder)
    if replaced := sum(shard.num_replaced for shard in manifest.shards()):
        log.warning(
            "%s has text that is not valid UTF-8, which was replaced by U+FFFD (number of documents: %d). "
            "data.undecodable=refuse stops at the first one and names its file.",
            *(corpus.origin, replaced),
        )
    _remove_intermediate_files(folder)
    return manifest


def _warn_of_unequal_split(manifest: Manifest, config: DataConfig) -> None:
    """Warns if the fraction of val differs much from ``data.val_fraction``, as it may with few documents."""
    sizes = {split: sum(shard.bytes for shard in manifest.splits[split]) for split in SPLITS}
    share = sizes["val"] / max(1, sum(sizes.values()))
    if not config.val_fraction / MAX_SPLIT_RATIO <= share <= config.val_fraction * MAX_SPLIT_RATIO:
        log.warning(
            "%.1f%% of %s is in val, although data.val_fraction=%s, because there are few documents or their lengths "
            "differ much. Another data.split_seed selects other documents.",
            *(100 * share, manifest.origin, config.val_fraction),
        )


def _remove_intermediate_files(folder: Path) -> None:
    """Deletes the intermediate files. The tokenizer's record is last, so its absence means that all are deleted."""
    kept = {MANIFEST, TOKENIZER_FILE} | {shard.file for shard in load_shards(folder).shards()}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink(missing_ok=True)
    (folder / TOKENIZER_FILE).unlink(missing_ok=True)


def _sample_texts(corpus: Corpus, tasks: list[Task]) -> list[Iterator[str]]:
    """Returns an iterator over the texts of each task."""
    return [(document.text for document in corpus.documents(task)) for task in tasks]


def _spread(tasks: list[Task]) -> list[Task]:
    """Returns at most ``NUM_SAMPLE_TEXTS`` tasks from all parts of the corpus."""
    return tasks[:: -(-len(tasks) // NUM_SAMPLE_TEXTS)]


def _can_use_bulk_encoder(tokenizer: Tokenizer, corpus: Corpus, tasks: list[Task]) -> bool:
    """Returns whether gigatoken is installed and agrees with the tokenizer on a sample of the corpus."""
    encode = bulk_encoder(tokenizer)
    if encode is None:
        return False
    if is_equivalent(tokenizer, encode, _sample_texts(corpus, _spread(tasks))):
        log.info("Using gigatoken, which returns the same token IDs as the tokenizer on a sample of the corpus.")
        return True
    log.warning("Not using gigatoken: its token IDs differ from the tokenizer's on a sample of the corpus.")
    return False
