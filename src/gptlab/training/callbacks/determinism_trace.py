"""The trace of a run: hashes of its tokens and tensors at every step, with which two runs can be compared by ``diff``.

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
from torch.distributed.tensor import DTensor

from gptlab.data.batches import Batch
from gptlab.data.shards.manifest import write_durably
from gptlab.training.distributed.strategies import reduce_over_data_ranks
from gptlab.training.module import GPTModule

LANES, BITS = 4, 32  # of the hash of many windows: sums of so many unsigned numbers of so many bits
DIGEST = 8  # bytes of a tensor's hash


class DeterminismTrace(L.Callback):
    """Writes a line of JSON after every so many steps.

    Each has the step, a hash of its tokens, its global loss and gradient norm as Python writes them, exact, and a hash
    of every parameter and moment after it. A run that goes on keeps the lines up to where it does. All ranks add up
    their tokens and gather sharded tensors, one at a time; the first hashes and writes.

    Args:
        path: The file; of the first rank alone.
        every: Steps between lines.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._sums = zero_sums()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut off what lies beyond the step that the run stands at."""
        if trainer.is_global_zero:
            write_durably(self.path, "".join(_lines_until(self.path, trainer.global_step)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Add the micro-batch to the tokens of its step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._sums = zero_sums()
        if (trainer.global_step + 1) % self.every == 0:
            self._sums += hash_windows(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write the step that this micro-batch completed, if it did and its turn has come."""
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
            tensor = part.full_tensor() if isinstance(part, DTensor) else part
            if trainer.is_global_zero:
                hashes[name] = hash_tensor(tensor)
        if trainer.is_global_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"tensors": hashes}) + "\n")


def named_tensors(module: GPTModule, trainer: L.Trainer) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and, as <parameter>.<moment>, what the optimizer keeps of it; sharded, this rank's part."""
    for name, parameter in module.model.named_parameters():
        yield name, parameter.detach()
        for optimizer in trainer.optimizers:
            for moment, tensor in optimizer.state.get(parameter, {}).items():
                yield f"{name}.{moment}", tensor


def zero_sums() -> NDArray[np.int64]:
    """Return the sums (LANES,) of no windows at all."""
    return np.zeros(LANES, dtype=np.int64)


def hash_windows(batch: Batch) -> NDArray[np.int64]:
    """Hash each window (T + 1,) of a micro-batch; return sums (LANES,) that add up over micro-batches and ranks.

    A sum does not depend on who had which window. It holds any 2**31 of them.
    """
    rows = torch.cat((batch.idx, batch.targets[:, -1:]), dim=1).cpu().numpy()  # (B, T + 1)
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=LANES * BITS // 8).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u4").reshape(-1, LANES).sum(axis=0, dtype=np.int64)


def format_sums(sums: NDArray[np.int64]) -> str:
    """Write the sums (LANES,) of a whole step, each modulo 2**BITS."""
    return "".join(f"{value % 2**BITS:0{BITS // 4}x}" for value in sums.tolist())


def hash_tensor(tensor: Tensor) -> str:
    """Hash the bytes of a whole tensor."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=DIGEST).hexdigest()


def _lines_until(path: Path, step: int) -> Iterator[str]:
    """Yield the lines up to a step; nothing follows one that a killed run has not finished."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            return
        yield line
