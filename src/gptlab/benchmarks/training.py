"""suite=train: training steps, from a plain loop to gptlab's defaults, with one more optimization per row.

python -m gptlab.benchmarks.training <task as JSON> measures one combination of optimizations.
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

from gptlab.benchmarks.config import TrainBench, TrainingSteps
from gptlab.benchmarks.measuring import Result, ResultTable, Sample, Variant, measure_in_turns, run_timed
from gptlab.files import use_private_compile_cache
from gptlab.model.config import flops_per_token
from gptlab.model.generation.inference import cuda_seconds
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.devices import choose_devices, peak_memory, prepare_kernels
from gptlab.training.hardware import Hardware, resolve_loss_chunk

WARM_UP = 2  # steps that are not timed; the first includes compilation
SIDE, CUDA_SIDE = 2048, 8192  # size of the square matrices of the matmul that measures the ceiling
MATMULS = 8


class Levers(NamedTuple):
    """Optimizations of a training step; the defaults are those of a plain loop.

    Attributes:
        fused: Whether AdamW is fused.
        float32_matmul: Library of float32 matmuls; see ``gptlab.training.hardware.Hardware``.
        precision: "32-true" or "bf16-mixed".
        compile: Whether the loss and its gradient are compiled.
        chunked: Whether the logits are computed in chunks.
        own: Whether gptlab chooses all of these automatically.
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
    "+ oneDNN matmuls": Levers(fused=True, float32_matmul="onednn"),
    "+ compiled": Levers(fused=True, float32_matmul="onednn", compile=True),
    "gptlab, defaults": Levers(own=True),
}
IN_BFLOAT16 = {
    "plain loop: eager, float32": Levers(),
    "+ oneDNN matmuls": Levers(float32_matmul="onednn"),
    "+ bfloat16": Levers(precision="bf16-mixed"),
    "+ fused AdamW": Levers(precision="bf16-mixed", fused=True),
    "+ compiled": Levers(precision="bf16-mixed", fused=True, compile=True),
    "gptlab, defaults": Levers(own=True),
}
EAGER = Levers(precision="bf16-mixed", fused=True)
WITH_CHUNKS = {
    "full logits": EAGER,
    "chunked logits": EAGER._replace(chunked=True),
    "compiled, full logits": EAGER._replace(compile=True),
    "compiled, chunked logits": EAGER._replace(compile=True, chunked=True),
}


def measure(bench: TrainBench, rounds: int) -> Iterator[ResultTable]:
    """Measures one model after the other; each sample is measured in a new process."""
    for title, shape, levers in (
        ("Small character model", bench.characters, IN_FLOAT32),
        ("Character model", bench.characters_large, IN_BFLOAT16),
        ("GPT-2", bench.gpt2, IN_BFLOAT16),
    ):
        yield _steps(title, shape, levers, rounds)
    yield _memory(bench.memory, rounds)


def _steps(title: str, shape: TrainingSteps, levers: dict[str, Levers], rounds: int) -> ResultTable:
    caption = (
        f"{_shape(shape)} Tokens/s: from the median of {shape.steps} steps. Ceiling: FLOP/s of a large matmul in the "
        "precision of the row, measured by the same process (a token counts as 6 N + 12 L C T FLOPs). Loss: after the "
        "last step, on random tokens. Peak MB: peak memory."
    )
    columns = ("% of ceiling", "loss", "peak MB")
    return ResultTable(f"{title}: training", caption, "tokens/s", columns, _rows(shape, levers, rounds))


def _memory(shape: TrainingSteps, rounds: int) -> ResultTable:
    caption = f"{_shape(shape)} Peak memory, including weights, gradients and optimizer state."
    rows = _rows(shape, WITH_CHUNKS, rounds)
    for row in rows:
        for sample, whole in zip(row.samples, rows[0].samples, strict=True):
            sample["% less"] = 100 * (1 - sample["peak MB"] / whole["peak MB"])
    return ResultTable("GPT-2: memory of a step", caption, "tokens/s", ("peak MB", "% less", "loss"), rows)


def _rows(shape: TrainingSteps, levers: dict[str, Levers], rounds: int) -> list[Result]:
    def variant(name: str, chosen: Levers) -> Variant:
        task = {"levers": chosen._asdict(), "shape": shape.model_dump(mode="json")}

        def run(_: int) -> Sample:
            return json.loads(run_timed("-m", "gptlab.benchmarks.training", json.dumps(task)).printed.splitlines()[-1])

        return Variant("", name, run)

    return measure_in_turns([variant(name, chosen) for name, chosen in levers.items()], rounds)


def _shape(shape: TrainingSteps) -> str:
    model = shape.model
    return (
        f"{model.n_layer} layers of width {model.n_embd}, {shape.batch_size} sequences of {model.block_size} tokens, "
        f"vocabulary of {model.vocab_size:,}."
    )


def measure_steps(shape: TrainingSteps, levers: Levers) -> dict[str, float]:
    """Trains on random tokens, which are the same in every process; returns speed, loss and peak memory."""
    devices = choose_settings(shape, levers)
    prepare_kernels(devices)
    device = torch.device(devices.accelerator)
    dtype = torch.bfloat16 if devices.precision == "bf16-mixed" else torch.float32
    ceiling = matmul_flops(device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    model = build_gpt(shape.model).to(device)
    size = (shape.batch_size, shape.model.block_size + 1)
    tokens = torch.randint(shape.model.known_vocab_size, size, device=device)
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=levers.fused or levers.own)
    chunk = resolve_loss_chunk("auto", shape.model, devices) if levers.chunked or levers.own else None
    loss = build_loss(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), devices, chunk)
    seconds, last = [], 0.0
    for _ in range(WARM_UP + shape.steps):
        start = time.perf_counter()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = value.item()
        seconds.append(time.perf_counter() - start)
    per_second = tokens[:, 1:].numel() / median(seconds[WARM_UP:])
    return {
        "tokens/s": per_second,
        "% of ceiling": 100 * per_second * flops_per_token(shape.model) / ceiling,
        "ceiling GFLOP/s": ceiling / 1e9,
        "loss": last,
        "peak MB": peak_memory(device) / 1e6,
        "first step s": seconds[0],
    }


def choose_settings(shape: TrainingSteps, levers: Levers) -> Hardware:
    """Returns the hardware settings that gptlab chooses, or those of the levers."""
    trainer = SimpleNamespace(
        accelerator="auto", strategy="single", devices=1, num_nodes=1, precision="auto", float32_matmul="auto"
    )
    train = SimpleNamespace(compile="auto")
    chosen = choose_devices(cast(TrainerConfig, trainer), cast(TrainConfig, train), shape.model)
    if levers.own:
        return chosen
    if levers.float32_matmul == "onednn" and chosen.float32_matmul != "onednn":
        levers = levers._replace(float32_matmul="default")  # no advantage on this CPU
    return chosen._replace(
        precision=levers.precision, compile="whole" if levers.compile else False, float32_matmul=levers.float32_matmul
    )


def build_loss(model: GPT, idx: Tensor, targets: Tensor, devices: Hardware, chunk: int | None) -> Callable[[], Tensor]:
    """Returns a function that computes the loss of the batch, a tensor of shape ()."""

    def plain() -> Tensor:
        return F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten())

    use_private_compile_cache()
    own = torch.compile(model.loss) if devices.compile else model.loss
    mixed = devices.precision == "bf16-mixed"

    def loss() -> Tensor:
        with torch.autocast(devices.accelerator, torch.bfloat16) if mixed else nullcontext():
            return own(idx, targets, None, chunk) if devices.compile or chunk else plain()

    return loss


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a matmul of two square matrices, the best of eight measurements."""
    side = CUDA_SIDE if device.type == "cuda" else SIDE
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    if device.type == "cuda":
        return 2 * side**3 / min(cuda_seconds(lambda: a @ b, MATMULS))
    best = float("inf")
    for _ in range(MATMULS):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(measure_steps(TrainingSteps.model_validate(task["shape"]), Levers(**task["levers"]))))
