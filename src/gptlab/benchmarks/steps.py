"""Training steps in one process, with the levers that are named.

python -m gptlab.benchmarks.steps <what to do, in JSON>
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from gptlab.benchmarks.training import Levers, StepsOfModel
from gptlab.model.config import flops_per_token
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.devices import choose_devices, peak_memory, prepare_kernels
from gptlab.training.hardware import Hardware, resolve_loss_chunk

WARM_UP = 2  # steps; the first compiles
SIDE = 2048  # of the matrices whose product is the ceiling


def main() -> None:
    """Measure, and print what came out as JSON."""
    values = json.loads(sys.argv[1])
    levers = Levers(**values.pop("levers"))
    print(json.dumps(measure_steps(StepsOfModel.model_validate(values), levers)))


def measure_steps(shape: StepsOfModel, levers: Levers) -> dict[str, float]:
    """Train on random tokens, the same in every process."""
    devices = choose_settings(shape, levers)
    prepare_kernels(devices)
    device = torch.device(devices.accelerator)
    dtype = torch.bfloat16 if devices.precision == "bf16-mixed" else torch.float32
    ceiling = product_flops(device, dtype)
    torch.manual_seed(0)
    model = build_gpt(shape.model).to(device)
    size = (shape.batch_size, shape.model.block_size + 1)
    tokens = torch.randint(shape.model.known_vocab_size, size, device=device)
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=levers.fused or levers.own)
    chunk = resolve_loss_chunk("auto", shape.model) if levers.chunked or levers.own else None
    loss = loss_of(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), devices, chunk)
    seconds, last = [], 0.0
    for _ in range(WARM_UP + shape.steps):
        begun = time.perf_counter()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = value.item()
        seconds.append(time.perf_counter() - begun)
    per_second = tokens[:, 1:].numel() / median(seconds[WARM_UP:])
    return {
        "tokens/s": per_second,
        "% of ceiling": 100 * per_second * flops_per_token(shape.model) / ceiling,
        "ceiling GFLOP/s": ceiling / 1e9,
        "loss": last,
        "peak MB": peak_memory(device) / 1e6,
        "first step s": seconds[0],
    }


def choose_settings(shape: StepsOfModel, levers: Levers) -> Hardware:
    """What is computed on, and how: as gptlab chooses, or as the levers say."""
    trainer = SimpleNamespace(
        accelerator="auto", strategy="single", devices=1, num_nodes=1, precision="auto", float32_matmul="auto"
    )
    train = SimpleNamespace(compile="auto")
    chosen = choose_devices(cast(TrainerConfig, trainer), cast(TrainConfig, train), shape.model)
    if levers.own:
        return chosen
    if levers.float32_matmul == "onednn" and chosen.float32_matmul != "onednn":
        levers = levers._replace(float32_matmul="default")  # it is not for this processor
    return chosen._replace(
        precision=levers.precision, compile="whole" if levers.compile else False, float32_matmul=levers.float32_matmul
    )


def loss_of(model: GPT, idx: Tensor, targets: Tensor, devices: Hardware, chunk: int | None) -> Callable[[], Tensor]:
    """Return what computes the loss () of the batch."""

    def plain() -> Tensor:
        return F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten())

    own = torch.compile(model.loss) if devices.compile else model.loss
    mixed = devices.precision == "bf16-mixed"

    def loss() -> Tensor:
        with torch.autocast(devices.accelerator, torch.bfloat16) if mixed else nullcontext():
            return own(idx, targets, None, chunk) if devices.compile or chunk else plain()

    return loss


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two square matrices, the best of some."""
    a, b = torch.randn(2, SIDE, SIDE, device=device).to(dtype).unbind()
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        (a @ b).sum().item()  # waits for it
        best = min(best, time.perf_counter() - begun)
    return 2 * SIDE**3 / best


if __name__ == "__main__":
    main()
