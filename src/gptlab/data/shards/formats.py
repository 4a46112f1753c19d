"""Reads and writes token files of other programs. All are little-endian.

| format  | layout                                                                                            |
|---------|---------------------------------------------------------------------------------------------------|
| nanogpt | raw uint16 (nanoGPT's train.bin, val.bin)                                                         |
| llmc    | 256 int32 (20240520, 1, tokens), then uint16 (llm.c, modded-nanogpt); or (20240801, 7), uint32    |
| npy     | a one-dimensional uint16 array as numpy saves it (build-nanogpt)                                  |

Raw tokens cannot be confused with a header: both magic numbers begin with a uint16 beyond GPT-2's vocabulary.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gptlab.data.shards.manifest import FORMAT, SPLITS, Manifest, Shard, Split
from gptlab.data.shards.streams import ShardStore, TokenStream
from gptlab.data.tokenizers.external import META_FILE, meta_file
from gptlab.data.tokenizers.tokenizer import CharactersTokenizer, Tokenizer
from gptlab.errors import UserError, failure_reason
from gptlab.files import replacing, write_file
from gptlab.progress import Advance, track_reading

log = logging.getLogger(__name__)

HEADER_INTS, HEADER_BYTES = 256, 1024
LLMC_UINT16, LLMC_UINT32 = (20240520, 1), (20240801, 7)  # magic number, version
CHUNK = 2**22  # tokens that are read or written at a time

Format = Literal["nanogpt", "llmc"]


class TokenFileLayout(NamedTuple):
    """Byte offset, number and dtype of the tokens in a file."""

    offset: int
    tokens: int
    dtype: Literal["uint16", "uint32"]


def read_layout(path: Path) -> TokenFileLayout:
    """Detects the layout of a token file from its content.

    Raises:
        UserError: The header, the shape or the size of the file is invalid, or it has no tokens.
    """
    layout = _read_layout(path)
    if not layout.tokens:
        raise UserError(f"{path} has no tokens.")
    return layout


def _read_layout(path: Path) -> TokenFileLayout:
    size = path.stat().st_size
    if path.suffix.lower() == ".npy":
        return _npy_layout(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) == HEADER_INTS and int(header[0]) in (LLMC_UINT16[0], LLMC_UINT32[0]):
        magic, version, tokens = (int(value) for value in header[:3])
        if (magic, version) not in (LLMC_UINT16, LLMC_UINT32):
            raise UserError(f"{path} has llm.c's magic number {magic} but the unknown version {version}.")
        dtype: Literal["uint16", "uint32"] = "uint16" if magic == LLMC_UINT16[0] else "uint32"
        expected = HEADER_BYTES + tokens * np.dtype(dtype).itemsize
        if size != expected:
            raise UserError(
                f"{path} has {size:,} bytes, but its header ({tokens:,} tokens) requires {expected:,} bytes."
            )
        return TokenFileLayout(HEADER_BYTES, tokens, dtype)
    if size % 2:
        raise UserError(f"{path} has an odd number of bytes ({size:,}), so it cannot hold uint16 tokens.")
    return TokenFileLayout(0, size // 2, "uint16")


def _npy_layout(path: Path) -> TokenFileLayout:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("it is an archive")
    except ValueError as error:
        raise UserError(f"{path} is not an array saved by numpy: {error}.") from error
    if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise UserError(
            f"{path} holds {array.dtype} values of shape {array.shape}. Tokens must be a one-dimensional array of "
            "uint16 or uint32."
        )
    return TokenFileLayout(array.offset, len(array), "uint16" if array.dtype.itemsize == 2 else "uint32")


def split_from_name(path: Path) -> Split:
    """Returns the split that is part of a file's name. Raises UserError if the name contains neither or both."""
    splits = [split for split in SPLITS if split in path.name]
    if len(splits) != 1:
        raise UserError(f"{path}: the file name must contain either train or val to identify its split.")
    return splits[0]


def build_manifest(paths: list[Path], tokenizer: Tokenizer) -> Manifest:
    """Builds the manifest of existing token files. Reads, hashes and checks every token once.

    Raises:
        UserError: The size, header or shape of a file is invalid, the files differ in dtype, a split is missing, a
            token ID is outside of the vocabulary, or raw tokens are not uint16. The message names the file and the
            offset.
    """
    splits: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    dtypes = {}
    size = sum(path.stat().st_size for path in paths)
    with track_reading(f"Reading {len(paths)} token files", size) as advance:
        for path in paths:
            found = read_layout(path)
            dtypes[found.dtype] = path
            splits[split_from_name(path)].append(_read_shard(path, found, tokenizer, advance))
    if missing := [split for split in SPLITS if not splits[split]]:
        raise UserError(f"{paths[0]} and {len(paths) - 1} other files include none for {' and '.join(missing)}.")
    if len(dtypes) > 1:
        raise UserError(f"{' and '.join(map(str, dtypes.values()))} differ in dtype: {', '.join(dtypes)}.")
    return Manifest(
        format=FORMAT,
        origin=str(paths[0].parent),
        tokenizer=tokenizer.record(),
        vocab_size=tokenizer.vocab_size,
        dtype=next(iter(dtypes)),
        splits=splits,
    )


def _read_shard(path: Path, found: TokenFileLayout, tokenizer: Tokenizer, advance: Advance) -> Shard:
    dtype = np.dtype(found.dtype).newbyteorder("<")
    digest, text_bytes, documents, is_wide = hashlib.sha256(), 0, 0, found.offset == 0 and found.tokens > 1
    lengths = tokenizer.token_bytes()
    for start in range(0, found.tokens, CHUNK):
        # not memory-mapped, because the pages would count as memory of the process
        chunk = np.fromfile(path, dtype, count=CHUNK, offset=found.offset + start * dtype.itemsize)
        if (beyond := chunk >= tokenizer.vocab_size).any():
            index = start + int(beyond.argmax())
            raise UserError(
                f"{path}: token {index:,} (byte {found.offset + index * dtype.itemsize:,}) is {chunk[index - start]}, "
                f"which is outside of the tokenizer's vocabulary of {tokenizer.vocab_size:,} token IDs."
            )
        is_wide = is_wide and not chunk[1::2].any()  # as in little-endian integers below 2**16 of 32 or 64 bits
        digest.update(chunk.data)
        advance(chunk.nbytes)
        text_bytes += int(lengths[chunk].sum(dtype=np.int64))
        documents += int((chunk == tokenizer.end_of_text).sum()) if tokenizer.end_of_text is not None else 0
    if is_wide:
        raise UserError(
            f"{path} seems to have 32-bit or 64-bit tokens, because every second 16-bit value is 0. Raw tokens "
            "must be uint16. Save others with numpy.save as uint32, in a file whose name ends in .npy."
        )
    return Shard(
        file=str(path.absolute()),
        offset=found.offset,
        tokens=found.tokens,
        bytes=text_bytes,
        documents=documents,
        sha256=digest.hexdigest(),
    )


def convert(
    store: ShardStore,
    manifest: Manifest,
    tokenizer: Tokenizer | None,
    kind: Format,
    out: Path,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Writes shards as token files of another program, and returns their paths.

    The format "nanogpt" gives train.bin and val.bin, and meta.pkl for characters; "llmc" gives one file per shard.

    Args:
        store: Store of the shards.
        manifest: Manifest of the shards.
        tokenizer: Their tokenizer, needed only for meta.pkl.
        kind: Format of the files.
        out: Directory of the files, created if missing.
        overwrite: Whether to replace existing files.

    Raises:
        UserError: The vocabulary does not fit into uint16, or a file exists already and ``overwrite`` is false.
    """
    if manifest.vocab_size > 2**16:
        raise UserError(f"format={kind} stores uint16, which cannot hold vocab_size={manifest.vocab_size:,} token IDs.")
    files = {split: list(_output_files(split, manifest.splits[split], kind)) for split in SPLITS}
    names = [name for split in SPLITS for name, _ in files[split]]
    if kind == "nanogpt" and isinstance(tokenizer, CharactersTokenizer):
        names.append(META_FILE)
    existing = [out / name for name in names if os.path.lexists(out / name)]
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} already exists. Choose another directory with out=<dir>, or replace it with overwrite=true."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be created: {failure_reason(error)}.") from error
    written = []
    for split in SPLITS:
        for name, shards in files[split]:
            path = out / name
            part = manifest.model_copy(update={"splits": {**manifest.splits, split: shards}})
            stream = TokenStream(store, part, split)
            size = len(stream) * stream.dtype.itemsize
            with replacing(path) as file, track_reading(f"Writing {name}", size) as advance:
                if kind == "llmc":
                    file.write(_llmc_header(len(stream)))
                for chunk in stream.chunks(CHUNK):
                    file.write(chunk.astype("<u2").tobytes())
                    advance(len(chunk) * stream.dtype.itemsize)
            written.append(path)
    if META_FILE in names and isinstance(tokenizer, CharactersTokenizer):
        write_file(out / META_FILE, meta_file(tokenizer))
        written.append(out / META_FILE)
    elif manifest.tokenizer["name"] != "gpt2":
        log.warning(
            "The files have the token IDs of tokenizer=%s and not its vocabulary. Programs that read this format "
            "assume GPT-2's tokenizer.",
            manifest.tokenizer["name"],
        )
    return written


def _output_files(split: Split, shards: list[Shard], kind: Format) -> Iterator[tuple[str, list[Shard]]]:
    """Yields the output files of a split, each with the shards that it will contain."""
    if kind == "nanogpt":
        yield f"{split}.bin", shards
    else:
        yield from ((f"{split}_{number:06d}.bin", [shard]) for number, shard in enumerate(shards))


def _llmc_header(tokens: int) -> bytes:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = (*LLMC_UINT16, tokens)
    return header.tobytes()
