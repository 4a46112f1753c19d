"""Token files of other programs: reading and writing. All are little-endian.

| format  | layout                                                                                            |
|---------|---------------------------------------------------------------------------------------------------|
| nanogpt | raw uint16 (nanoGPT's train.bin, val.bin)                                                         |
| llmc    | 256 int32: 20240520, 1, tokens; then uint16 (llm.c, modded-nanogpt); or 20240801, 7: then uint32  |
| npy     | a one-dimensional uint16 array as numpy saves it (build-nanogpt)                                  |

Telling raw tokens from a header is safe: both magic numbers begin with a uint16 beyond GPT-2's vocabulary.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gptlab.data.shards.manifest import FORMAT, SPLITS, Manifest, Shard, Split
from gptlab.data.shards.streams import ShardStore, TokenStream
from gptlab.data.tokenizers.tokenizer import Tokenizer
from gptlab.errors import UserError

HEADER_INTS, HEADER_BYTES = 256, 1024
LLMC_UINT16, LLMC_UINT32 = (20240520, 1), (20240801, 7)  # magic and version
CHUNK = 2**22  # tokens looked at or copied at a time

Format = Literal["nanogpt", "llmc"]


class TokenFileLayout(NamedTuple):
    """Position and dtype of the tokens in a file."""

    offset: int
    tokens: int
    dtype: Literal["uint16", "uint32"]


def read_layout(path: Path) -> TokenFileLayout:
    """Detects the layout of a token file from its content; raises UserError if it is inconsistent."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        return _npy_layout(path)
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) == HEADER_INTS and int(header[0]) in (LLMC_UINT16[0], LLMC_UINT32[0]):
        magic, version, tokens = (int(value) for value in header[:3])
        if (magic, version) not in (LLMC_UINT16, LLMC_UINT32):
            raise UserError(f"{path} has llm.c's magic number {magic} but version {version}, which is unknown.")
        dtype: Literal["uint16", "uint32"] = "uint16" if magic == LLMC_UINT16[0] else "uint32"
        expected = HEADER_BYTES + tokens * np.dtype(dtype).itemsize
        if size != expected:
            raise UserError(
                f"{path} should have {expected:,} bytes by its header ({tokens:,} tokens) and has {size:,}."
            )
        return TokenFileLayout(HEADER_BYTES, tokens, dtype)
    if size % 2:
        raise UserError(f"{path} has an odd number of bytes, {size:,}: it cannot be uint16 tokens.")
    return TokenFileLayout(0, size // 2, "uint16")


def _npy_layout(path: Path) -> TokenFileLayout:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is not an array that numpy saved: {error}.") from error
    if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}; tokens are one row of uint16 or uint32.")
    return TokenFileLayout(array.offset, len(array), "uint16" if array.dtype.itemsize == 2 else "uint32")


def split_from_name(path: Path) -> Split:
    """Returns the split that a file's name contains; raises UserError if it contains neither or both."""
    named = [split for split in SPLITS if split in path.name]
    if len(named) != 1:
        raise UserError(f"{path}: its name should hold either train or val, to say which split it is.")
    return named[0]


def build_manifest(paths: list[Path], tokenizer: Tokenizer) -> Manifest:
    """Builds the manifest of token files where they are; every token is read once, hashed and checked.

    Raises:
        UserError: A file's length, magic or shape is wrong, files differ in their type, a split is missing, or an id is
            beyond the vocabulary; the file and the offset are named.
    """
    splits: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    dtypes = {}
    for path in paths:
        found = read_layout(path)
        dtypes[found.dtype] = path
        splits[split_from_name(path)].append(_read_shard(path, found, tokenizer))
    if missing := [split for split in SPLITS if not splits[split]]:
        raise UserError(f"Among {paths[0]} and {len(paths) - 1} other files there is none for {' and '.join(missing)}.")
    if len(dtypes) > 1:
        raise UserError(f"{' and '.join(map(str, dtypes.values()))} differ in their type: {', '.join(dtypes)}.")
    return Manifest(
        format=FORMAT,
        origin=str(paths[0].parent),
        tokenizer=tokenizer.record(),
        vocab_size=tokenizer.vocab_size,
        dtype=next(iter(dtypes)),
        splits=splits,
    )


def _read_shard(path: Path, found: TokenFileLayout, tokenizer: Tokenizer) -> Shard:
    tokens = np.memmap(path, dtype=np.dtype(found.dtype).newbyteorder("<"), mode="r", offset=found.offset)
    digest, text_bytes, documents = hashlib.sha256(), 0, 0
    lengths = tokenizer.token_bytes()
    for start in range(0, found.tokens, CHUNK):
        chunk = np.asarray(tokens[start : start + CHUNK])
        if (beyond := chunk >= tokenizer.vocab_size).any():
            index = start + int(beyond.argmax())
            raise UserError(
                f"{path}: token {index:,} (byte {found.offset + index * tokens.itemsize:,}) is {tokens[index]}, beyond "
                f"the {tokenizer.vocab_size:,} ids of the tokenizer."
            )
        digest.update(chunk.tobytes())
        text_bytes += int(lengths[chunk].sum(dtype=np.int64))
        documents += int((chunk == tokenizer.end_of_text).sum()) if tokenizer.end_of_text is not None else 0
    return Shard(
        file=str(path.absolute()),
        offset=found.offset,
        tokens=found.tokens,
        bytes=text_bytes,
        documents=documents,
        sha256=digest.hexdigest(),
    )


def convert(store: ShardStore, manifest: Manifest, kind: Format, out: Path) -> list[Path]:
    """Writes shards as another program's files: nanogpt's train.bin and val.bin, or one llmc file for each shard.

    Raises:
        UserError: The vocabulary does not fit uint16, or a file is there already.
    """
    if manifest.vocab_size > 2**16:
        raise UserError(f"{manifest.vocab_size:,} ids do not fit the uint16 of format={kind}.")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for split in SPLITS:
        for name, shards in _output_files(split, manifest.splits[split], kind):
            path = out / name
            if path.exists():
                raise UserError(f"{path} is there already; name another folder: out=<dir>")
            part = manifest.model_copy(update={"splits": {**manifest.splits, split: shards}})
            stream = TokenStream(store, part, split)
            unfinished = path.with_name(f".{path.name}")
            with unfinished.open("wb") as file:
                if kind == "llmc":
                    file.write(_llmc_header(len(stream)))
                for chunk in stream.chunks(CHUNK):
                    file.write(chunk.astype("<u2").tobytes())
            unfinished.replace(path)
            written.append(path)
    return written


def _output_files(split: Split, shards: list[Shard], kind: Format) -> Iterator[tuple[str, list[Shard]]]:
    """Yields the files of a split, each with the shards that go into it."""
    if kind == "nanogpt":
        yield f"{split}.bin", shards
    else:
        yield from ((f"{split}_{number:06d}.bin", [shard]) for number, shard in enumerate(shards))


def _llmc_header(tokens: int) -> bytes:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = (*LLMC_UINT16, tokens)
    return header.tobytes()
