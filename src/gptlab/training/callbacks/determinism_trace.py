"""Determinism trace: hashes of a run's tokens and tensors at every step, to compare two runs with ``diff``.

Shapes: B sequences of the micro-batch, T time.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptlab.data.batches import Batch
from gptlab.files import append_whole, skip_if_disk_full, write_durably
from gptlab.training.distributed.strategies import full_tensor, reduce_over_data_ranks
from gptlab.training.module import GPTModule

LANES, BITS = 4, 32  # the hash of a step's windows is LANES sums of BITS-bit unsigned integers
DIGEST = 8  # size of a tensor's hash, in bytes


class DeterminismTrace(L.Callback):
    """Writes one line of JSON every ``every`` steps.

    A line has the step, a hash of its tokens, its global loss and gradient norm (exact, as ``repr``), and a hash of
    every parameter and every tensor of the optimizer state after the step. A resumed run keeps the lines up to its
    first step. All ranks sum the hashes of their tokens and gather sharded tensors, one at a time; rank 0 hashes the
    tensors and writes the line.

    Args:
        path: The trace file, written by rank 0 only.
        every: Steps between lines.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._sums = zero_sums()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes the lines of steps after ``trainer.global_step``."""
        if trainer.is_global_zero:
            write_durably(self.path, "".join(_lines_until(self.path, trainer.global_step)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Adds the micro-batch to the token hash of its step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._sums = zero_sums()
        if (trainer.global_step + 1) % self.every == 0:
            self._sums += hash_windows(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Writes a line if this micro-batch completed a step and the step is a multiple of ``every``."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step % self.every:
            return
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        sums = torch.from_numpy(self._sums).to(pl_module.device)
        line = {
            "step": trainer.global_step,
            "tokens": format_sums(reduce_over_data_ranks(sums, trainer, "sum").cpu().numpy()),
            "loss": repr(pl_module.global_step_loss()),
            "grad_norm": repr(pl_module.grad_norm.item()),
        }
        hashes = {}
        for name, part in named_tensors(pl_module, trainer):
            tensor = full_tensor(part)
            if trainer.is_global_zero:
                hashes[name] = hash_tensor(tensor)
        if trainer.is_global_zero:
            with skip_if_disk_full(self.path):
                append_whole(self.path, json.dumps(line | {"tensors": hashes}) + "\n")


def named_tensors(module: GPTModule, trainer: L.Trainer) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter and, as <parameter>.<key>, its optimizer state; if sharded, this rank's shards."""
    for name, parameter in module.model.named_parameters():
        yield name, parameter.detach()
        for optimizer in trainer.optimizers:
            for moment, tensor in optimizer.state.get(parameter, {}).items():
                yield f"{name}.{moment}", tensor


def zero_sums() -> NDArray[np.int64]:
    """Returns the hash sums (LANES,) of zero windows."""
    return np.zeros(LANES, dtype=np.int64)


def hash_windows(batch: Batch) -> NDArray[np.int64]:
    """Hashes each window (T + 1,) of a micro-batch; returns sums (LANES,) that add up over micro-batches and ranks.

    The sums do not depend on the distribution of the windows over ranks. They do not overflow for up to 2**31 windows.
    """
    rows = torch.cat((batch.idx, batch.targets[:, -1:]), dim=1).cpu().numpy()  # (B, T + 1)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=LANES * BITS // 8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u4").reshape(-1, LANES).sum(axis=0, dtype=np.int64)


def format_sums(sums: NDArray[np.int64]) -> str:
    """Returns the sums (LANES,) of a step, each modulo 2**BITS, as a hexadecimal string."""
    return "".join(f"{value % 2**BITS:0{BITS // 4}x}" for value in sums.tolist())


def hash_tensor(tensor: Tensor) -> str:
    """Returns the BLAKE2b hash of a tensor's bytes, in hexadecimal."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=DIGEST).hexdigest()


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """Yields the lines up to a step; stops at an incomplete line, which a killed run may have left."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            return
        yield line
