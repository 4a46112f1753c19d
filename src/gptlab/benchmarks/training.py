"""suite=train: training steps, from a plain loop to what gptlab does, one lever after the other.

python -m gptlab.benchmarks.training <what to do, in JSON> measures one combination of levers.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from gptlab.benchmarks.config import StepsOfModel, TrainBench
from gptlab.benchmarks.measuring import Result, ResultTable, Sample, Variant, measure_in_turns, run_timed
from gptlab.model.config import flops_per_token
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.devices import choose_devices, peak_memory, prepare_kernels
from gptlab.training.hardware import Hardware, resolve_loss_chunk

WARM_UP = 2  # steps; the first compiles
SIDE = 2048  # of the matrices whose product is the ceiling


class Levers(NamedTuple):
    """How a step is computed; the defaults are those of a plain loop.

    Attributes:
        fused: AdamW as one kernel.
        float32_matmul: See ``gptlab.training.hardware.Hardware``.
        precision: "32-true" or "bf16-mixed".
        compile: The loss and its gradient compiled.
        chunked: The logits in chunks.
        own: All of it as gptlab chooses.
    """

    fused: bool = False
    float32_matmul: str = "default"
    precision: str = "32-true"
    compile: bool = False
    chunked: bool = False
    own: bool = False


IN_FLOAT32 = {
    "plain loop: eager, float32": Levers(),
    "+ fused AdamW": Levers(fused=True),
    "+ oneDNN's products": Levers(fused=True, float32_matmul="onednn"),
    "+ compiled": Levers(fused=True, float32_matmul="onednn", compile=True),
    "gptlab, by itself": Levers(own=True),
}
IN_BFLOAT16 = {
    "plain loop: eager, float32": Levers(),
    "+ oneDNN's products": Levers(float32_matmul="onednn"),
    "+ bfloat16": Levers(precision="bf16-mixed"),
    "+ fused AdamW": Levers(precision="bf16-mixed", fused=True),
    "+ compiled": Levers(precision="bf16-mixed", fused=True, compile=True),
    "gptlab, by itself": Levers(own=True),
}
EAGER = Levers(precision="bf16-mixed", fused=True)
WITH_CHUNKS = {
    "logits at once": EAGER,
    "logits in chunks": EAGER._replace(chunked=True),
    "compiled, at once": EAGER._replace(compile=True),
    "compiled, in chunks": EAGER._replace(compile=True, chunked=True),
}


def measure(bench: TrainBench, rounds: int) -> Iterator[ResultTable]:
    """Measures one model after the other; every sample is a process of its own."""
    for title, shape, levers in (
        ("Small character model", bench.characters, IN_FLOAT32),
        ("Character model", bench.characters_large, IN_BFLOAT16),
        ("GPT-2", bench.gpt2, IN_BFLOAT16),
    ):
        yield _steps(title, shape, levers, rounds)
    yield _memory(bench.memory, rounds)


def _steps(title: str, shape: StepsOfModel, levers: dict[str, Levers], rounds: int) -> ResultTable:
    caption = (
        f"{_shape(shape)} Tokens/s by the median of {shape.steps} steps. The ceiling is that of matrix products in the "
        "precision of the row, measured by the same process; beside it what the row reaches of it (6 N + 12 L C T "
        "operations a token). Loss after the steps, on random tokens; peak: of the process' memory."
    )
    columns = ("% of ceiling", "loss", "peak MB")
    return ResultTable(f"{title}: training", caption, "tokens/s", columns, _rows(shape, levers, rounds))


def _memory(shape: StepsOfModel, rounds: int) -> ResultTable:
    caption = f"{_shape(shape)} Memory that the process has at most, weights, gradients and moments included."
    rows = _rows(shape, WITH_CHUNKS, rounds)
    for row in rows:
        for sample, whole in zip(row.samples, rows[0].samples, strict=True):
            sample["% less"] = 100 * (1 - sample["peak MB"] / whole["peak MB"])
    return ResultTable("GPT-2: memory of a step", caption, "tokens/s", ("peak MB", "% less", "loss"), rows)


def _rows(shape: StepsOfModel, levers: dict[str, Levers], rounds: int) -> list[Result]:
    def way(name: str, chosen: Levers) -> Variant:
        todo = {"levers": chosen._asdict(), "shape": shape.model_dump(mode="json")}

        def run(_: int) -> Sample:
            return json.loads(run_timed("-m", "gptlab.benchmarks.training", json.dumps(todo)).printed.splitlines()[-1])

        return Variant("", name, run)

    return measure_in_turns([way(name, chosen) for name, chosen in levers.items()], rounds)


def _shape(shape: StepsOfModel) -> str:
    model = shape.model
    return (
        f"{model.n_layer} layers of {model.n_embd}, {shape.batch_size} sequences of {model.block_size} tokens, "
        f"{model.vocab_size:,} ids."
    )


def measure_steps(shape: StepsOfModel, levers: Levers) -> dict[str, float]:
    """Trains on random tokens, the same in every process."""
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
    """Returns what gptlab chooses, or what the levers say."""
    trainer = SimpleNamespace(
        accelerator="auto", strategy="single", devices=1, num_nodes=1, precision="auto", float32_matmul="auto"
    )
    train = SimpleNamespace(compile="auto")
    chosen = choose_devices(cast(TrainerConfig, trainer), cast(TrainConfig, train), shape.model)
    if levers.own:
        return chosen
    if levers.float32_matmul == "onednn" and chosen.float32_matmul != "onednn":
        levers = levers._replace(float32_matmul="default")  # this processor has no use for it
    return chosen._replace(
        precision=levers.precision, compile="whole" if levers.compile else False, float32_matmul=levers.float32_matmul
    )


def loss_of(model: GPT, idx: Tensor, targets: Tensor, devices: Hardware, chunk: int | None) -> Callable[[], Tensor]:
    """Returns a function that computes the loss () of the batch."""

    def plain() -> Tensor:
        return F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten())

    own = torch.compile(model.loss) if devices.compile else model.loss
    mixed = devices.precision == "bf16-mixed"

    def loss() -> Tensor:
        with torch.autocast(devices.accelerator, torch.bfloat16) if mixed else nullcontext():
            return own(idx, targets, None, chunk) if devices.compile or chunk else plain()

    return loss


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the product of two square matrices, the best of eight."""
    a, b = torch.randn(2, SIDE, SIDE, device=device).to(dtype).unbind()
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        (a @ b).sum().item()  # waits for it
        best = min(best, time.perf_counter() - begun)
    return 2 * SIDE**3 / best


if __name__ == "__main__":
    todo = json.loads(sys.argv[1])
    print(json.dumps(measure_steps(StepsOfModel.model_validate(todo["shape"]), Levers(**todo["levers"]))))
