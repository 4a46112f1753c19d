"""Opens existing shards: prepared directories, local or remote, and token files of other programs."""

import hashlib
import json
import logging
from glob import glob, has_magic
from pathlib import Path

from gptlab.config.components import component_arguments
from gptlab.data.config import ComponentTokenizerConfig, DataConfig, TokenizerConfig
from gptlab.data.shards.formats import build_manifest
from gptlab.data.shards.manifest import LOCK, MANIFEST, SUFFIXES, Manifest, load_shards
from gptlab.data.shards.remote import RemoteFolder, fetch_files
from gptlab.data.shards.streams import LocalFolder, ShardStore
from gptlab.data.shards.token_dataset import TokenDataset, check_unchanged, lock_cache, record_verified
from gptlab.data.sources.files import hash_listing
from gptlab.data.sources.readers import Decoding
from gptlab.data.tokenizers.external import META_FILE, read_meta
from gptlab.data.tokenizers.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from gptlab.errors import UserError, failure_reason

log = logging.getLogger(__name__)


def open_shards(config: DataConfig, tokenizer: TokenizerConfig, stored: Tokenizer | None = None) -> TokenDataset:
    """Opens the shards at ``data.path``.

    Args:
        config: Config of the data.
        tokenizer: Tokenizer of the shards. Token files of other programs do not specify it.
        stored: Tokenizer of a run, which replaces the one of a file.

    Raises:
        UserError: The shards are missing, incomplete, damaged, or made with another tokenizer.
    """
    store, manifest = find_shards(config, tokenizer, stored=stored)
    if (name := manifest.tokenizer["name"]) != tokenizer.name:
        raise UserError(
            f"data.path={config.path} was prepared with tokenizer={name}, not with tokenizer={tokenizer.name}."
        )
    if name == "file" and manifest.tokenizer != (stored or build_tokenizer(tokenizer, ())).record():
        raise UserError(f"data.path={config.path} was prepared with another tokenizer than {_path(tokenizer)}.")
    if isinstance(tokenizer, ComponentTokenizerConfig) and manifest.tokenizer["component"] != tokenizer.component:
        arguments = component_arguments(manifest.tokenizer["component"])
        raise UserError(f"data.path={config.path} was prepared with other arguments of tokenizer={name}: {arguments}.")
    return TokenDataset(store, manifest, load_tokenizer(manifest.tokenizer, tokenizer.vocab_dir, config.path))


def find_shards(
    config: DataConfig, tokenizer: TokenizerConfig, key: str = "data.path", stored: Tokenizer | None = None
) -> tuple[ShardStore, Manifest]:
    """Finds the shards at ``data.path`` without building the tokenizer of prepared shards, which may be another one.

    Args:
        config: Config of the data.
        tokenizer: Tokenizer of token files of other programs, which do not specify it.
        key: Key of the command that has the path, for messages.
        stored: Tokenizer of a run, which replaces the one of a file.

    Raises:
        UserError: The shards are missing, incomplete or damaged.
    """
    if config.path is None:
        raise UserError(
            "data=shards requires data.path=<a prepared directory, the URL of one, or a glob of token files>"
        )
    cache_dir = ensure_cache_dir(config)
    store: ShardStore
    if config.is_remote and not has_magic(config.path):
        store = RemoteFolder(config.path, cache_dir, config.cache_limit_gb * 1e9, key)
        manifest = store.manifest
    else:
        path = str(fetch_files(config.path, cache_dir, key)) if config.is_remote else config.path
        folder, described = _find_folder(path, cache_dir, tokenizer, key, stored)
        manifest = load_shards(folder, described)
        check_unchanged(folder, manifest, cache_dir)
        store = LocalFolder(folder)
    return store, manifest


def ensure_cache_dir(config: DataConfig) -> Path:
    """Creates ``data.cache_dir`` and returns its path. Raises UserError if that fails."""
    cache_dir = Path(config.cache_dir).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={config.cache_dir} cannot be created: {failure_reason(error)}.") from error
    return cache_dir


def _find_folder(
    path: str, cache_dir: Path, tokenizer: TokenizerConfig, key: str, stored: Tokenizer | None
) -> tuple[Path, list[Path]]:
    """Returns the prepared directory at ``path``, or one in the cache that describes token files of other programs.

    The second value has these token files.
    """
    named = Path(path).expanduser()  # the name of a directory may contain glob characters
    matches = [named] if named.exists() else [Path(match) for match in glob(str(named))]  # noqa: PTH207  (absolute)
    folders = {match if match.is_dir() else match.parent for match in matches if match.suffix != LOCK}
    prepared = [folder for folder in folders if (folder / MANIFEST).exists()]
    if len(folders) == 1 and prepared:
        return folders.pop(), []
    if not matches or prepared or len(folders) > 1:
        found = f"matches files in {len(folders)} directories" if matches else "matches nothing"
        raise UserError(f"{key}={path} {found}. It must match one directory of shards (relative to {Path.cwd()}).")
    inside = sorted(folders.pop().glob("*")) if matches == [named] and named.is_dir() else sorted(matches)
    files = [path for path in inside if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{key}={path} has neither a {MANIFEST} nor token files (.bin, .npy).")
    meta = files[0].with_name(META_FILE)
    if meta.exists() and tokenizer.name != "characters":
        raise UserError(
            f"tokenizer={tokenizer.name} does not match {meta}, which maps the tokens to characters. "
            "Use tokenizer=characters."
        )
    read = [*files, meta] if meta.exists() else files
    listing = hash_listing(files[0].parent, read, str(Decoding(None, "replace", 0)))
    if isinstance(tokenizer, ComponentTokenizerConfig) or tokenizer.name == "file":
        stored = stored or build_tokenizer(tokenizer, ())
        record = json.dumps(stored.record(), sort_keys=True)
        listing = hashlib.sha256(f"{listing}{record}".encode()).hexdigest()
    return _describe_files(cache_dir / f"shards-{tokenizer.name}-{listing[:12]}", files, tokenizer, stored), files


def _describe_files(folder: Path, files: list[Path], tokenizer: TokenizerConfig, stored: Tokenizer | None) -> Path:
    """Writes the manifest of token files into ``folder``, if it does not exist yet."""
    with lock_cache(Path(f"{folder}{LOCK}")) as is_writable:
        if not (folder / MANIFEST).exists():
            if not is_writable:
                raise UserError(
                    f"The manifest of {files[0].parent} cannot be written to {folder}, because data.cache_dir is "
                    "read-only. Set data.cache_dir to a directory of your own."
                )
            folder.mkdir(parents=True, exist_ok=True)
            known = stored or _tokenizer(files[0], tokenizer)
            log.info(
                "%s has no %s. Reading its %d token files to write one to %s.",
                *(files[0].parent, MANIFEST, len(files), folder),
            )
            manifest = build_manifest(files, known)
            record_verified(folder, manifest, folder.parent)
            manifest.save(folder)
    return folder


def _path(tokenizer: TokenizerConfig) -> str:
    return f"tokenizer.path={getattr(tokenizer, 'path', None)}"


def _tokenizer(file: Path, config: TokenizerConfig) -> Tokenizer:
    """Builds the tokenizer of a token file; for characters, from the meta.pkl in the same directory."""
    if config.name in ("gpt2", "bytes") or isinstance(config, ComponentTokenizerConfig):
        return build_tokenizer(config, ())
    if config.name == "characters" and (meta := file.with_name(META_FILE)).exists():
        return read_meta(meta)
    raise UserError(
        f"{file} cannot be read with tokenizer={config.name}, because it does not contain the vocabulary. Use "
        f"tokenizer=gpt2, bytes or file, or characters if nanoGPT's {META_FILE} is in the same directory."
    )
