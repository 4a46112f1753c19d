"""HellaSwag's examples (Zellers et al. 2019): JSON Lines, and llm.c's binary format. Imports no torch.

| file   | layout                                                                                               |
|--------|------------------------------------------------------------------------------------------------------|
| .jsonl | an object a line, with ctx, endings and label (hellaswag_val.jsonl of the data set itself)             |
| .bin   | of llm.c: 256 int32 (20240522, 1, examples, bytes of the longest), then a record of uint16 an example:  |
|        | 65535, its bytes, its number, label, 4, then the context and the endings, each after its length        |
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptlab.data.tokenizers.tokenizer import Tokenizer
from gptlab.errors import UserError

MAGIC, VERSION, HEADER_INTS = 20240522, 1, 256
EXAMPLE_MARKER = 2**16 - 1  # of a record: no token of GPT-2's has this id
ENDINGS = 4  # which llm.c expects
PREFIX = 5  # numbers of a record before its context


class Example(NamedTuple):
    """Context and its possible endings, as token ids, and the index of the correct ending."""

    context: list[int]
    endings: list[list[int]]
    label: int


def read_examples(path: Path, tokenizer: Tokenizer, limit: int | None) -> list[Example]:
    """Reads the first ``limit`` examples, or all.

    An ending is encoded by itself, after a space, as llm.c and build-nanogpt do it.

    Raises:
        UserError: The file is missing or damaged, or its tokens are not those of ``tokenizer``.
    """
    try:
        with path.open("rb") as file:
            is_bin = int.from_bytes(file.read(4), "little") == MAGIC
        if is_bin:
            if (name := tokenizer.record()["name"]) != "gpt2":
                raise UserError(
                    f"{path} holds GPT-2's tokens, and the model's are of tokenizer={name}: take the .jsonl."
                )
            examples = _read_bin(path)
        else:
            examples = _read_jsonl(path, tokenizer, limit)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"The examples of HellaSwag cannot be read from {path}: {error}. It should be hellaswag_val.jsonl "
            "(github.com/rowanz/hellaswag, in data/), or the .bin that llm.c makes of it."
        ) from error
    if not examples:
        raise UserError(f"{path} holds no example.")
    return examples[:limit]


# what is checked before a run starts is scored in the same process, with the same tokenizer
read_examples_cached = lru_cache(maxsize=1)(read_examples)


def write_bin(path: Path, examples: Sequence[Example]) -> None:
    """Writes examples, in GPT-2's tokens, in llm.c's format.

    Raises:
        UserError: They do not fit the format.
    """
    if len(examples) >= EXAMPLE_MARKER:
        raise UserError(f"{path}: {len(examples):,} examples, and their numbers have 16 bits.")
    records = [_bin_record(path, number, example) for number, example in enumerate(examples)]
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = (MAGIC, VERSION, len(records), max((record.nbytes for record in records), default=0))
    path.write_bytes(header.tobytes() + b"".join(record.tobytes() for record in records))


def _bin_record(path: Path, number: int, example: Example) -> NDArray[np.uint16]:
    if len(example.endings) != ENDINGS:
        raise UserError(f"{path}: example {number} has {len(example.endings)} endings, and llm.c's have {ENDINGS}.")
    parts = [value for ids in (example.context, *example.endings) for value in (len(ids), *ids)]
    size = 2 * (PREFIX + len(parts))
    if size >= EXAMPLE_MARKER or max(parts) >= EXAMPLE_MARKER:
        raise UserError(
            f"{path}: example {number} does not fit: its size and its ids should be below {EXAMPLE_MARKER}."
        )
    return np.array([EXAMPLE_MARKER, size, number, example.label, ENDINGS, *parts], dtype="<u2")


def _read_bin(path: Path) -> list[Example]:
    content = path.read_bytes()
    if len(content) < 4 * HEADER_INTS or len(content) % 2:
        raise ValueError(f"{len(content):,} bytes are no whole file")
    version, number = np.frombuffer(content, dtype="<i4", count=3).tolist()[1:]
    if version != VERSION:
        raise ValueError(f"it is of version {version}, not {VERSION}")
    stream = np.frombuffer(content, dtype="<u2", offset=4 * HEADER_INTS).tolist()
    examples, offset = [], 0
    for count in range(number):
        begin, size, _, label, endings = (*stream[offset : offset + PREFIX], *[-1] * PREFIX)[:PREFIX]
        record = stream[offset + PREFIX : offset + size // 2]
        texts = _split_record(record)
        if (
            begin != EXAMPLE_MARKER
            or len(record) != size // 2 - PREFIX
            or len(texts) != 1 + endings
            or not 0 <= label < endings
        ):
            raise ValueError(f"the record of example {count} (uint16 number {offset:,}) is damaged")
        examples.append(Example(texts[0], texts[1:], label))
        offset += size // 2
    return examples


def _split_record(record: list[int]) -> list[list[int]]:
    """Splits a record into its context and its endings; returns nothing if a length is wrong."""
    texts, offset = [], 0
    while offset < len(record):
        end = offset + 1 + record[offset]
        if not offset + 1 < end <= len(record):
            return []
        texts.append(record[offset + 1 : end])
        offset = end
    return texts


def _read_jsonl(path: Path, tokenizer: Tokenizer, limit: int | None) -> list[Example]:
    examples: list[Example] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(examples) == limit:
                break
            if line.strip():
                examples.append(_parse_example(json.loads(line), tokenizer, number))
    return examples


def _parse_example(fields: Any, tokenizer: Tokenizer, number: int) -> Example:
    """Encodes one line; the hub's copy of the data set has the label as text."""
    values: dict[str, Any] = fields if isinstance(fields, dict) else {}
    context: Any
    endings: Any
    label: Any
    context, endings, label = (values.get(key) for key in ("ctx", "endings", "label"))
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    is_complete = isinstance(context, str) and context and isinstance(endings, list) and isinstance(label, int)
    if not is_complete or not 0 <= label < len(endings) or not all(isinstance(ending, str) for ending in endings):
        raise ValueError(f"line {number} has no ctx, endings and label that go together")
    beginning = tokenizer.encode(context).tolist()
    return Example(beginning, [tokenizer.encode(f" {ending}").tolist() for ending in endings], label)
