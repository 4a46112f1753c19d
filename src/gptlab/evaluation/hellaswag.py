"""HellaSwag examples (Zellers et al. 2019) as JSON Lines and in llm.c's binary format. Imports no torch.

| file   | layout                                                                                               |
|--------|------------------------------------------------------------------------------------------------------|
| .jsonl | one object per line with ctx, endings and label (hellaswag_val.jsonl of the dataset)                 |
| .bin   | llm.c: 256 int32 (20240522, 1, examples, bytes of the longest record), then a uint16 record per      |
|        | example: 65535, bytes, index, label, 4, then the context and the endings, each after its length      |
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptlab.data.tokenizers.tokenizer import Tokenizer
from gptlab.errors import UserError, failure_reason

MAGIC, VERSION, HEADER_INTS = 20240522, 1, 256
EXAMPLE_MARKER = 2**16 - 1  # start of a record; not a token ID of GPT-2
ENDINGS = 4  # endings per example in llm.c's format
PREFIX = 5  # uint16 values of a record before its context


class Example(NamedTuple):
    """Context and its possible endings as token IDs, and the index of the correct ending."""

    context: list[int]
    endings: list[list[int]]
    label: int


def read_examples(path: Path, tokenizer: Tokenizer, limit: int | None) -> list[Example]:
    """Reads the examples of HellaSwag.

    Each ending is encoded separately, preceded by a space, as in llm.c and build-nanogpt.

    Args:
        path: JSON Lines file or .bin file of llm.c.
        tokenizer: Tokenizer of the model.
        limit: Number of examples to read. None reads all.

    Raises:
        UserError: The file is missing, damaged or empty, or was made with another tokenizer.
    """
    try:
        with path.open("rb") as file:
            is_bin = int.from_bytes(file.read(4), "little") == MAGIC
        if is_bin:
            if (name := tokenizer.record()["name"]) != "gpt2":
                raise UserError(
                    f"{path} holds tokens of tokenizer=gpt2, but the model has tokenizer={name}. Use the .jsonl file."
                )
            examples = _read_bin(path)
        else:
            examples = _read_jsonl(path, tokenizer, limit)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"The HellaSwag examples cannot be read from {path}: {failure_reason(error)}. Use hellaswag_val.jsonl from "
            "github.com/rowanz/hellaswag (in data/), or the .bin file that llm.c writes."
        ) from error
    if not examples:
        raise UserError(f"{path} contains no examples.")
    return examples[:limit]


# The same process reads the examples to check the config of a run, and again to score them.
read_examples_cached = lru_cache(maxsize=1)(read_examples)


def write_bin(path: Path, examples: Sequence[Example]) -> None:
    """Writes examples, encoded with GPT-2's tokenizer, in llm.c's format.

    Raises:
        UserError: There are too many examples, or one does not fit the format.
    """
    if len(examples) >= EXAMPLE_MARKER:
        raise UserError(
            f"{path} cannot hold {len(examples):,} examples, because the format stores their index in 16 bits."
        )
    records = [_bin_record(path, number, example) for number, example in enumerate(examples)]
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = (MAGIC, VERSION, len(records), max((record.nbytes for record in records), default=0))
    path.write_bytes(header.tobytes() + b"".join(record.tobytes() for record in records))


def _bin_record(path: Path, number: int, example: Example) -> NDArray[np.uint16]:
    if len(example.endings) != ENDINGS:
        raise UserError(
            f"{path}: example {number} has {len(example.endings)} endings, but llm.c requires {ENDINGS} endings."
        )
    parts = [value for ids in (example.context, *example.endings) for value in (len(ids), *ids)]
    size = 2 * (PREFIX + len(parts))
    if size >= EXAMPLE_MARKER or max(parts) >= EXAMPLE_MARKER:
        raise UserError(
            f"{path}: example {number} does not fit the format: its size in bytes and its token IDs must be less than "
            f"{EXAMPLE_MARKER}."
        )
    return np.array([EXAMPLE_MARKER, size, number, example.label, ENDINGS, *parts], dtype="<u2")


def _read_bin(path: Path) -> list[Example]:
    content = path.read_bytes()
    if len(content) < 4 * HEADER_INTS or len(content) % 2:
        raise ValueError(f"the file is truncated ({len(content):,} bytes)")
    version, number = np.frombuffer(content, dtype="<i4", count=3).tolist()[1:]
    if version != VERSION:
        raise ValueError(f"it has version {version} instead of {VERSION}")
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
            raise ValueError(f"the record of example {count} (at uint16 offset {offset:,}) is damaged")
        examples.append(Example(texts[0], texts[1:], label))
        offset += size // 2
    return examples


def _split_record(record: list[int]) -> list[list[int]]:
    """Splits a record into its context and its endings. Returns an empty list if a length is wrong."""
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
    """Encodes one line. The label may be a string, as in the dataset on the Hugging Face Hub."""
    values: dict[str, Any] = fields if isinstance(fields, dict) else {}
    context: Any
    endings: Any
    label: Any
    context, endings, label = (values.get(key) for key in ("ctx", "endings", "label"))
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    is_complete = isinstance(context, str) and context and isinstance(endings, list) and isinstance(label, int)
    if not is_complete or not 0 <= label < len(endings) or not all(isinstance(ending, str) for ending in endings):
        raise ValueError(f"line {number} has no valid ctx, endings and label")
    beginning = tokenizer.encode(context).tolist()
    return Example(beginning, [tokenizer.encode(f" {ending}").tolist() for ending in endings], label)
