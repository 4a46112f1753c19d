"""Times a training step of GPT-2 124M and its kernels: python profile_step.py <loss chunk, or none> [rows]."""

import sys
import time

import torch

from gptlab.model.config import flops_per_token
from gptlab.model.modern import build_gpt
from gptlab.training.hardware import gpu_from_cuda_name
from measuring import CUDA, DEVICE, NAME, SMALL, config, synchronize

STEPS, PROFILED_STEPS, KERNELS = 10, 3, 14


def main() -> None:
    chunk = None if sys.argv[1] == "none" else int(sys.argv[1])
    rows = (int(sys.argv[2]) if len(sys.argv) > 2 else 32) if CUDA else 2
    shape = config(pad_vocab_to_multiple_of=64) if CUDA else config(**SMALL)
    torch.manual_seed(0)
    model = build_gpt(shape).to(DEVICE)
    tokens = torch.randint(shape.vocab_size, (rows, shape.block_size + 1), device=DEVICE)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = torch.compile(model.loss) if CUDA else model.loss

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = loss_of(idx, targets, None, chunk)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def seconds(steps: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        return (time.perf_counter() - start) / steps

    first = seconds(1)
    seconds(3)
    took = seconds(STEPS)
    speed = idx.numel() / took
    gpu = gpu_from_cuda_name(NAME)
    mfu = f"{100 * speed * flops_per_token(shape) / gpu.flops:.1f} % MFU" if gpu else "MFU unknown"
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0
    print(
        f"INFO profile chunk={chunk}: first step {first:.0f} s; {1e3 * took:.1f} ms per step, {speed:,.0f} tokens/s, "
        f"{mfu}; peak {peak:.1f} GiB",
        flush=True,
    )
    if not CUDA:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds(PROFILED_STEPS)
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e3 / PROFILED_STEPS
    launches = sum(kernel.count for kernel in kernels) // PROFILED_STEPS
    print(f"     kernels {busy:.1f} ms of {1e3 * took:.1f} ms per step, {launches} launches")
    for kernel in kernels[:KERNELS]:
        each = kernel.self_device_time_total / 1e3 / PROFILED_STEPS
        print(f"     {each:8.2f} ms {kernel.count // PROFILED_STEPS:5d} x {kernel.key[:110]}")


if __name__ == "__main__":
    main()
