"""Corpus to shards, once: prepared data is kept in the cache and used again. Imports no torch."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from gptlab.data.config import DataConfig, TokenizerConfig
from gptlab.data.corpora import Corpus, Document, open_corpus
from gptlab.data.shards import FORMAT, MANIFEST, SPLITS, Manifest, ShardWriter, Split, load_shards
from gptlab.data.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from gptlab.errors import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"  # the file beside a prepared folder that keeps two processes from making it at once


class Prepared(NamedTuple):
    """A folder of shards, what it holds, and its tokenizer."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer


def prepare(config: DataConfig, tokenizer: TokenizerConfig) -> Prepared:
    """Return the prepared data that the configuration names, making it where the cache does not have it.

    Processes that ask at the same time, on one file system, wait for the one that makes it.

    Raises:
        UserError: The corpus, the vocabulary or the shards are missing, empty or damaged.
    """
    if config.corpus == "shards":
        folder = _shards_folder(config.path)
        manifest = load_shards(folder)
        if manifest.tokenizer["name"] != tokenizer.name:
            raise UserError(
                f"{folder} holds tokens of tokenizer={manifest.tokenizer['name']}, not of tokenizer={tokenizer.name}."
            )
        return Prepared(folder, manifest, load_tokenizer(manifest.tokenizer, tokenizer.vocab_dir))
    corpus = open_corpus(config)
    folder = _cache_folder(config, tokenizer, corpus)
    if config.source and Path(config.source).expanduser().resolve() in folder.resolve().parents:
        raise UserError(
            f"data.cache_dir={config.cache_dir} lies inside data.source={config.source}, so prepared data would be "
            "read as text the next time; name a folder outside."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={config.cache_dir} cannot be used: {error}.") from error
    with FileLock(f"{folder}{LOCK}"):
        if not (folder / MANIFEST).exists():
            _make(folder, config, tokenizer, corpus)
    try:
        manifest = load_shards(folder)
    except UserError as error:
        raise UserError(f"{error} Delete {folder} to have it prepared again.") from error
    return Prepared(folder, manifest, load_tokenizer(manifest.tokenizer, tokenizer.vocab_dir))


def _shards_folder(path: str | None) -> Path:
    if path is None:
        raise UserError("data=shards needs the shards: data.path=<a prepared folder, or a glob of its files>")
    named = Path(path).expanduser()  # a folder's own name may look like a glob
    matches = [named] if named.exists() else [Path(match) for match in glob(str(named))]  # noqa: PTH207  (absolute)
    folders = {match if match.is_dir() else match.parent for match in matches if match.suffix != LOCK}
    if len(folders) != 1:
        found = "matches nothing" if not folders else f"matches files of {len(folders)} folders"
        raise UserError(f"data.path={path} {found}; it should name one prepared folder (looked from {Path.cwd()}).")
    return folders.pop()


def _cache_folder(config: DataConfig, tokenizer: TokenizerConfig, corpus: Corpus) -> Path:
    """Name the folder by everything that its content depends on."""
    cut = [config.val_split, config.val_fraction, config.split_seed, config.shard_tokens]
    key = json.dumps([FORMAT, corpus.fingerprint(), tokenizer.name, cut])
    name = f"{config.corpus}-{tokenizer.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return Path(config.cache_dir).expanduser() / name


def _make(folder: Path, config: DataConfig, tokenizer_config: TokenizerConfig, corpus: Corpus) -> None:
    """Write the shards beside their final place, then rename: a folder is whole or not there."""
    log.info("Preparing %s with tokenizer=%s, once: %s", corpus.origin, tokenizer_config.name, folder)
    tokenizer = build_tokenizer(tokenizer_config, (document.text for document in corpus.documents()))
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        writers = {split: ShardWriter(new, split, dtype, config.shard_tokens) for split in SPLITS}
        for document in corpus.documents():
            for split, text in _split(document, config):
                if not text:
                    continue
                ids = tokenizer.encode(text)
                if tokenizer.end_of_text is not None:
                    ids = np.append(ids, np.uint32(tokenizer.end_of_text))
                writers[split].add(ids, len(text.encode("utf-8", errors="replace")))
        for split, writer in writers.items():
            writer.close()
            if not writer.shards:
                raise UserError(_nothing_in(split, corpus, config))
        Manifest(
            format=FORMAT,
            origin=corpus.origin,
            tokenizer=tokenizer.record(),
            vocab_size=tokenizer.vocab_size,
            dtype=dtype,
            splits={split: writer.shards for split, writer in writers.items()},
        ).save(new)
        shutil.rmtree(folder, ignore_errors=True)  # a folder without a manifest is a stranger's leftover
        new.rename(folder)


def _split(document: Document, config: DataConfig) -> Iterator[tuple[Split, str]]:
    """Give a document, or the two parts of it, to train and val."""
    if config.val_split == "tail":
        cut = int(len(document.text) * (1 - config.val_fraction))
        yield "train", document.text[:cut]
        yield "val", document.text[cut:]
    else:
        drawn = hashlib.sha256(f"{config.split_seed}\0{document.name}".encode()).digest()[:8]
        in_val = int.from_bytes(drawn) < config.val_fraction * 2**64
        yield ("val" if in_val else "train"), document.text


def _nothing_in(split: Split, corpus: Corpus, config: DataConfig) -> str:
    if config.val_split == "documents":
        return (
            f"{corpus.origin} leaves no document for {split} at data.val_fraction={config.val_fraction}: "
            "give a larger fraction, or cut every document with data.val_split=tail."
        )
    return f"{corpus.origin} is empty or too short: it leaves no text for {split}."
