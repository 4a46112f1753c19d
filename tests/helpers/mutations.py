"""Random damage to the files of a run directory, as somebody who wants to cause errors would do it."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

VALUES: tuple[Any, ...] = (
    *(None, [], {}, "x", "", -1, 0, 1.5, 1e308, 10**30, -(10**30), True, "\0", "../x", [[]], [1, 2], {"a": 1}),
    *("NaN", float("nan"), float("inf")),
)


def mutate(path: Path, choose: random.Random) -> str:
    """Damages one file: its bytes, one of its values, or the whole file. Returns a description.

    The hashes of a damaged checkpoint are recorded again, as if its author had damaged it.
    """
    if choose.random() < 0.05:
        path.unlink()
        done = "deleted"
    elif choose.random() < 0.25 or path.suffix not in (".json", ".yaml", ".pt", ".safetensors"):
        done = _mutate_bytes(path, choose)
    elif path.suffix == ".pt":
        values, done = _mutate_values(torch.load(path, weights_only=True), choose)
        torch.save(values, path)
    elif path.suffix == ".safetensors":
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        values, done = _mutate_values(json.loads(content[8 : 8 + size]), choose)
        header = json.dumps(values).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    else:
        values, done = _mutate_values(yaml.safe_load(path.read_text()), choose)
        path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    if path.parent.name.startswith("step_") and path.name != "record.json":
        record_again(path.parent)
    return f"{path.name}: {done}"


def record_again(checkpoint_dir: Path) -> None:
    """Writes the sizes and hashes of the files of a checkpoint as they are now."""
    path = checkpoint_dir / "record.json"
    record = json.loads(path.read_text())
    for name in record["files"]:
        if (checkpoint_dir / name).exists():
            content = (checkpoint_dir / name).read_bytes()
            record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(record))


def _mutate_bytes(path: Path, choose: random.Random) -> str:
    content = path.read_bytes()
    position = choose.randrange(len(content) + 1)
    kinds = {
        "truncated": content[:position],
        "empty": b"",
        "null byte": content[:position] + b"\0" + content[position:],
        "not UTF-8": content[:position] + b"\xff" + content[position:],
        "huge number": content[:position] + b"9" * 200_000 + content[position:],
        "twice": content * 2,
    }
    kind = choose.choice(list(kinds))
    path.write_bytes(kinds[kind])
    return f"{kind} at {position}"


def _mutate_values(values: Any, choose: random.Random) -> tuple[Any, str]:
    """Deletes or replaces one of the nested values, as often one near the top as any."""
    paths = list(_paths(values))
    path = choose.choice(paths if choose.random() < 0.5 else [found for found in paths if len(found) <= 2])
    if not path:
        return (value := choose.choice(VALUES)), f"replaced by {value!r}"
    parent = values
    for key in path[:-1]:
        if isinstance(parent[key], tuple):
            parent[key] = list(parent[key])
        parent = parent[key]
    key = path[-1]
    if choose.random() < 0.25:
        del parent[key]
        return values, f"{path} deleted"
    new = choose.choice(VALUES)
    if isinstance(parent[key], torch.Tensor) and choose.random() < 0.7:
        new = choose.choice(list(_tensors(parent[key])))
    parent[key] = new
    return values, f"{path} replaced by {new!r:.60}"


def _paths(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list | tuple) else ()
    )
    for key, value in items:
        yield from _paths(value, (*path, key))


def _tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields tensors of other shapes, dtypes and layouts, and one whose elements are all the same in memory."""
    yield from (torch.zeros(3, 3, 3), torch.zeros(0), torch.zeros(()), torch.zeros(1).expand(tensor.shape))
    yield from (tensor.to(torch.int64), tensor.to(torch.complex64), tensor * float("nan"))
    if tensor.dim():
        yield tensor.to_sparse()
