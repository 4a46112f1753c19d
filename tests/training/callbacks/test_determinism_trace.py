"""Determinism trace: hashes of tokens and tensors, and lines of resumed runs."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import assert_success, metrics, weights
from gptlab.data.batches import Batch
from gptlab.data.order import WindowOrder
from gptlab.data.shards.manifest import load_manifest
from gptlab.training.callbacks.determinism_trace import format_sums, hash_tensor, hash_windows, zero_sums


def batch_of(rows: torch.Tensor) -> Batch:
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(0, 50257, (12, 33), generator=torch.Generator().manual_seed(0))


def test_token_hash_does_not_depend_on_the_order_and_division_of_windows(rows):
    total = [0, 0, 0, 0]
    for row in rows.numpy().astype("<i8"):
        parts = struct.unpack("<4I", hashlib.blake2b(row.tobytes(), digest_size=16).digest())
        total = [(a + b) % 2**32 for a, b in zip(total, parts, strict=True)]
    expected = "".join(f"{part:08x}" for part in total)
    for size in (12, 6, 4, 1):
        for order in (torch.arange(12), torch.arange(12).flip(0)):
            sums = zero_sums()
            for part in rows[order].split(size):
                sums += hash_windows(batch_of(part))
            assert format_sums(sums) == expected


def test_token_hash_changes_with_any_token(rows):
    before = format_sums(hash_windows(batch_of(rows)))
    for position in ((0, 0), (5, 7), (11, 32)):  # the last is only a target
        changed = rows.clone()
        changed[position] += 1
        assert format_sums(hash_windows(batch_of(changed))) != before
    twice = torch.cat((rows[:1], rows[:1], rows[2:]))
    assert format_sums(hash_windows(batch_of(twice))) != before


def test_tensor_hash_is_the_hash_of_its_bytes(rows):
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = hashlib.blake2b(np.ascontiguousarray(tensor.numpy()).tobytes(), digest_size=8).hexdigest()
    assert hash_tensor(tensor) == hash_tensor(tensor.t().contiguous().t()) == expected
    nudged = tensor.clone()
    nudged[4, 6] = torch.nextafter(nudged[4, 6], torch.tensor(9.0))
    assert hash_tensor(nudged) != expected
    assert hash_tensor(torch.zeros(1)) != hash_tensor(-torch.zeros(1))
    assert hash_tensor(torch.tensor(3.0)) == hashlib.blake2b(struct.pack("<f", 3.0), digest_size=8).hexdigest()
    assert hash_tensor(tensor.bfloat16()) != hash_tensor((tensor + 1).bfloat16())


def expected_tokens(text: str, directory: Path) -> list[str]:
    """Returns the token hashes of six steps of twelve windows, from the first nine tenths of the text."""
    tokens = np.array([*text[: int(len(text) * 0.9)].encode(), 256])
    order = WindowOrder([len(tokens)], 32, 1337, load_manifest(directory).fingerprint(), "shuffled", 1, None)
    starts = order.starts(np.arange(6 * 12)).reshape(6, 12, 1)
    steps = torch.from_numpy(tokens[starts + np.arange(33)])
    return [format_sums(hash_windows(batch_of(rows))) for rows in steps]


@pytest.mark.slow
def test_a_trace_has_tokens_metrics_and_tensors_of_every_step(user):
    assert_success(user.train("callbacks=[checkpoint,trace]", "train.micro_batch_size=4"))
    directory = user.only_run()
    lines = [json.loads(line) for line in (directory / "trace.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["step"]: float(line["grad_norm"]) for line in lines} == metrics(directory, "grad_norm")
    assert {line["step"]: float(line["loss"]) for line in lines} == metrics(directory, "train/loss")
    assert [line["tokens"] for line in lines] == expected_tokens((user.folder / "text.txt").read_text(), directory)
    for name, tensor in weights(directory).items():
        if name != "lm_head.weight":  # tied to wte.weight, which is listed once
            expected = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()
            assert lines[-1]["tensors"][name] == expected, name
    assert {"wte.weight.exp_avg", "h.1.ln_2.bias.exp_avg_sq"} < set(lines[-1]["tensors"])


@pytest.mark.slow
def test_a_resumed_run_continues_the_trace(user):
    assert_success(user.train("name=whole", "callbacks=[checkpoint,trace]"))
    assert_success(user.train("name=halted", "callbacks=[checkpoint,trace]"))
    whole, halted = user.only_run("whole") / "trace.jsonl", user.only_run("halted") / "trace.jsonl"
    expected = whole.read_text()
    # as if the run had been killed while writing a line, two steps after its last checkpoint
    last = halted.parent / "checkpoints" / "step_000006"
    last.rename(halted.parent / "taken_away")
    lines = halted.read_text().splitlines(keepends=True)
    halted.write_text("".join(lines[:5]).replace('"step": 5, "tokens": "', '"step": 5, "tokens": "x') + lines[5][:40])
    assert_success(user.python("gptlab.train", f"resume={halted.parent}"))
    assert halted.read_text() == expected
