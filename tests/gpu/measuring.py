"""The device, model configs of conf/model, and measurements of time and memory."""

import time
from collections.abc import Callable
from typing import Any

import torch
import yaml

from gptlab.config.command import configuration_folder
from gptlab.model.config import GPTConfig

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NAME = torch.cuda.get_device_name() if CUDA else "cpu"
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 512}  # a model for any device


def config(name: str = "gpt2", **changes: Any) -> GPTConfig:
    """Returns the model config of conf/model/<name>.yaml with GPT-2's vocabulary and these changes."""
    folder = configuration_folder() / "model"
    values = yaml.safe_load((folder / "gpt.yaml").read_text())
    values |= yaml.safe_load((folder / f"{name}.yaml").read_text())["model"]
    return GPTConfig(**(values | {"vocab_size": 50257} | changes))


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], times: int = 20, warmup: int = 3) -> float:
    """Returns the median time of a call, measured with CUDA events on a GPU; on a CPU the median of three calls."""
    times, warmup = (times, warmup) if CUDA else (3, 1)
    for _ in range(warmup):
        function()
    measured = []
    for _ in range(times):
        if CUDA:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            measured.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            function()
            measured.append(1e3 * (time.perf_counter() - started))
    return sorted(measured)[len(measured) // 2]


def peak_memory(function: Callable[[], object]) -> float:
    """Returns the peak GPU memory of a call in MiB, beyond what was allocated before; 0 on a CPU."""
    if not CUDA:
        function()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
