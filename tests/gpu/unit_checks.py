"""Checks within one process: python unit_checks.py [name ...]. Prints lines with PASS, FAIL or INFO.

A failed check does not stop the others. Without a GPU, they run on the CPU with small sizes, to test the script.
Shapes: B batch, T time, N = B x T tokens, C channels.
"""

import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor

from gptlab.benchmarks.training import matmul_flops
from gptlab.config.command import configuration_folder
from gptlab.model.attention import attention_mask
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import collect_tokens, generate, plain_decoder
from gptlab.model.generation.inference import (
    Int8Linear,
    build_decoder,
    measure_memory_bandwidth,
    prepare_for_inference,
)
from gptlab.model.generation.kv_cache import CachePosition, KVCache
from gptlab.model.generation.sampler import row_seeds
from gptlab.model.kernels import attend
from gptlab.model.loss import LogitSettings, lm_loss
from gptlab.model.modern import build_gpt
from gptlab.training.callbacks.step_sync import StepReport, StepSync
from gptlab.training.config import AdamWConfig, MuonConfig
from gptlab.training.distributed.delayed_all_reduce import DelayedAllReduce
from gptlab.training.distributed.process_group import abort_group_on_error
from gptlab.training.hardware import gpu_from_cuda_name
from gptlab.training.module import GPTModule, seed_generators
from gptlab.training.optim.muon import StackedMuon
from gptlab.training.optim.optimizers import build_optimizer, skip_step_if
from measuring import CUDA, DEVICE, NAME, SMALL, config, milliseconds, peak_memory

BF16 = torch.bfloat16
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Registers a check under its name."""
    CHECKS[function.__name__] = function
    return function


def report(verdict: str, name: str, text: str) -> None:
    print(f"{verdict:4} unit.{name}: {text}", flush=True)


def expect(ok: bool, name: str, text: str) -> None:
    report("PASS" if ok else "FAIL", name, text)


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()


def worst_difference(results: list[list[Tensor]]) -> float:
    """Returns the largest relative difference between two lists of tensors."""
    return max(relative_difference(a, b) for a, b in zip(*results, strict=True))


@check
def ceilings() -> None:
    n = 8192 if CUDA else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=BF16) for _ in range(2))
    matmul = milliseconds(lambda: a @ b)
    source = torch.empty(2**30 if CUDA else 2**22, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    flops, rate = 2 * n**3 / matmul / 1e9, 2 * source.numel() / copy / 1e6
    report("INFO", "ceilings", f"bfloat16 matmul {flops:.0f} TFLOP/s; copy {rate:.0f} GB/s read and written")
    bench = [matmul_flops(torch.device(DEVICE), BF16) / 1e12, measure_memory_bandwidth(torch.device(DEVICE)) / 1e9]
    within = abs(bench[0] / flops - 1) < 0.15 and 0.8 < bench[1] / rate < 1.4
    text = f"the benchmark's matmul {bench[0]:.0f} TFLOP/s, read {bench[1]:.0f} GB/s"
    expect(within or not CUDA, "ceilings", text)


@check
def device() -> None:
    known = gpu_from_cuda_name(NAME) is not None
    text = f"{NAME!r}, torch {torch.__version__}, its peak FLOP/s are {'known' if known else 'NOT known'}"
    report(("PASS" if known else "FAIL") if CUDA else "INFO", "device", text)


@check
def norms_under_autocast() -> None:
    x = torch.randn(2, 64, device=DEVICE, dtype=BF16)
    with torch.autocast(DEVICE.type, BF16):
        dtype = F.rms_norm(x, (64,)).dtype
    report("INFO", "norms_under_autocast", f"dtype of rms_norm: {dtype} (float32 since torch 2.12)")


@check
def flex_matches_sdpa() -> None:
    """FlexAttention compared with scaled_dot_product_attention: outputs and gradients."""
    F32 = torch.float32
    for length, dtype, limit in ((512, F32, 2e-3), (512, BF16, 2e-2), (64, F32, 2e-3), (200, BF16, 2e-2)):
        T = length if CUDA else min(length, 100)
        torch.manual_seed(0)
        q, k, v = (torch.randn(3, 4, T, 64, device=DEVICE, dtype=dtype) for _ in range(3))
        documents = (torch.rand(3, T, device=DEVICE) < 0.02).long().cumsum(1)
        for window in (None, 48):
            results = []
            for flex in (CUDA, False):
                leaves = [t.clone().requires_grad_() for t in (q, k, v)]
                y = attend(*leaves, attention_mask(documents, documents, window, flex=flex), 0.0)
                y.square().sum().backward()
                results.append([y.detach(), *(leaf.grad for leaf in leaves)])
            worst = worst_difference(results)
            text = f"T={T} {dtype} window={window}: worst relative difference {worst:.1e}"
            expect(worst < limit, "flex_matches_sdpa", text)
    B, T = (32, 1024) if CUDA else (2, 128)
    documents = (torch.rand(B, T, device=DEVICE) < 0.003).long().cumsum(1)
    took = milliseconds(lambda: attention_mask(documents, documents, None, flex=True), times=5)
    report("INFO", "flex_matches_sdpa", f"mask of {B} x {T} tokens: {took:.2f} ms per micro-batch, eager")


@check
def causal_uses_flash() -> None:
    if not CUDA:
        report("INFO", "causal_uses_flash", "no GPU")
        return
    q, k, v = (torch.randn(8, 12, 1024, 64, device=DEVICE, dtype=BF16) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attend(q, k, v, None, 0.0)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    expect(any("flash" in n.lower() or "cudnn" in n.lower() for n in names), "causal_uses_flash", str(names)[:150])


@check
def loss_in_chunks() -> None:
    settings = LogitSettings(50257 if CUDA else 500, None)
    rows = 50304 if CUDA else 512
    N, C = (4096, 768) if CUDA else (64, 32)
    for dtype, limit in ((torch.float32, 1e-4), (BF16, 2e-2)):
        torch.manual_seed(0)
        x, w = torch.randn(N, C, device=DEVICE), 0.05 * torch.randn(rows, C, device=DEVICE)
        targets = torch.randint(settings.vocab_size, (N,), device=DEVICE)
        results = []
        for chunk in (None, N // 7):
            leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
            with torch.autocast(DEVICE.type, BF16, enabled=dtype == BF16):
                loss = lm_loss(*leaves, targets, settings, chunk)
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
        worst = worst_difference(results)
        text = f"{dtype}: with and without chunks, worst relative difference {worst:.1e}"
        expect(worst < limit, "loss_in_chunks", text)


@check
def loss_speed() -> None:
    """Time of the output head and loss of GPT-2, forward and backward, with chunks and an unpadded vocabulary."""
    compiled = torch.compile(lm_loss) if CUDA else lm_loss
    for label, rows, chunk, function in (
        ("50257 rows, chunk auto (333)", 50257, 333, lm_loss),
        ("50304 rows, chunk 333", 50304, 333, lm_loss),
        ("50304 rows, chunk 2048", 50304, 2048, lm_loss),
        ("50304 rows, chunk 8192", 50304, 8192, lm_loss),
        ("50304 rows, no chunks, compiled", 50304, None, compiled),
        ("50257 rows, no chunks, compiled", 50257, None, compiled),
    ):
        try:
            report("INFO", "loss_speed", f"{label}: {measured_loss(rows, chunk, function)}")
        except Exception as error:
            report("FAIL", "loss_speed", f"{label}: {type(error).__name__} {str(error)[:120]}")


def measured_loss(rows: int, chunk: int | None, function: Callable[..., Tensor]) -> str:
    N, C = (32768, 768) if CUDA else (256, 32)
    if not CUDA:
        rows, chunk = 512, chunk and 64
    settings = LogitSettings(min(rows, 50257), None)
    x = torch.randn(N, C, device=DEVICE, requires_grad=True)
    w = (0.02 * torch.randn(rows, C, device=DEVICE)).requires_grad_()
    targets = torch.randint(settings.vocab_size, (N,), device=DEVICE)

    def step() -> None:
        x.grad = w.grad = None
        with torch.autocast(DEVICE.type, BF16):
            loss = function(x, w, targets, settings, chunk)
        loss.backward()

    step()
    took, memory = milliseconds(step, times=7, warmup=2), peak_memory(step)
    flops = 6 * N * C * (50304 if CUDA else 512)
    return f"{took:.1f} ms for {N} tokens ({flops / took / 1e9:.0f} TFLOP/s), {memory:.0f} MiB"


@check
def muon() -> None:
    """Two updates of StackedMuon compared with torch.optim.Muon, which computes in bfloat16."""
    shapes = [(64, 64), (192, 64), (64, 256), (256, 64)] * 2
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        initial = [torch.randn(shape, device=DEVICE) for shape in shapes]
        gradients = [torch.randn(shape, device=DEVICE) for shape in shapes]
        results = []
        for kind in ("gptlab", "torch"):
            parameters = [torch.nn.Parameter(p.clone()) for p in initial]
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
            if kind == "gptlab":
                groups = [{"params": parameters, "lr": 0.02, "weight_decay": 0.1}]
                optimizer = StackedMuon(groups, ns_dtype=dtype, cautious=False)
            else:
                optimizer = torch.optim.Muon(parameters, lr=0.02, weight_decay=0.1)
            optimizer.step()
            optimizer.step()
            results.append([p.detach() - before for p, before in zip(parameters, initial, strict=True)])
        worst = worst_difference(results)
        text = f"{dtype}: updates compared with torch.optim.Muon, worst relative difference {worst:.1e}"
        expect(worst < 5e-2, "muon", text)


@check
def optimizers_speed() -> None:
    """Checks that a skipped step changes nothing; measures a step on the device and on the host."""
    model = build_gpt(config() if CUDA else config(**SMALL | {"n_layer": 1, "n_head": 2, "n_embd": 128})).to(DEVICE)
    for name, kind in (("adamw", AdamWConfig), ("muon", MuonConfig)):
        values = yaml.safe_load((configuration_folder() / "optimizer" / f"{name}.yaml").read_text())
        values |= {"lr": 1e-3} if name == "adamw" else {}
        optimizer = build_optimizer(model, kind(**values), fused=True)

        def step(bad: bool, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for p in model.parameters():
                p.grad = torch.full_like(p, float("nan")) if bad else torch.randn_like(p)
            skip_step_if(optimizer, torch.full((), float(bad), device=DEVICE))
            optimizer.step()

        def state(optimizer: torch.optim.Optimizer = optimizer) -> list[Tensor]:
            return [*model.parameters(), *(m for s in optimizer.state.values() for m in s.values())]

        step(bad=False)
        before = [tensor.detach().clone() for tensor in state()]
        step(bad=True)
        kept = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        expect(kept, "optimizers_speed", f"{name}: a bad step changes neither weights nor optimizer state")
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        skip_step_if(optimizer, torch.zeros((), device=DEVICE))
        start = time.perf_counter()
        optimizer.step()
        host = 1e3 * (time.perf_counter() - start)
        took, shape = milliseconds(optimizer.step, times=5), "GPT-2 124M" if CUDA else "a small model"
        report("INFO", "optimizers_speed", f"{name} of {shape}: {took:.1f} ms per step; {host:.1f} ms on the host")


@check
def seeds() -> None:
    torch.manual_seed(0)
    model = build_gpt(config(**SMALL, dropout=0.2)).to(DEVICE).train()
    idx = torch.randint(512, (4 if CUDA else 2, 256), device=DEVICE)
    functions = {"eager": model.loss} | ({"compiled": torch.compile(model.loss)} if CUDA else {})
    for name, loss in functions.items():
        losses = []
        for seed in (1, 2, 1):
            seed_generators(2**63 + seed)
            with torch.autocast(DEVICE.type, BF16):
                losses.append(loss(idx, idx, None, None).item())
        expect(losses[0] == losses[2] != losses[1], "seeds", f"{name}: dropout depends only on the seed: {losses}")


@check
def cached_generation() -> None:
    """Logits with and without the KV cache in float32; speed of one text in bfloat16 and int8."""
    torch.manual_seed(0)
    for name in ("gpt2", "gpt2_modern"):
        worst = cache_error(name)
        text = f"{name}, float32: logits with and without cache differ by {worst:.1e}"
        expect(worst < 5e-3, "cached_generation", text)
    if CUDA:
        compiled_generation()
    for label, int8, compiled in (
        ("bfloat16", False, False),
        ("int8", True, False),
        ("bfloat16, compiled", False, True),
    ):
        if compiled and not CUDA:
            continue
        try:
            speed = generation_speed(int8=int8, compiled=compiled)
            report("INFO", "cached_generation", f"{label}, one text: {speed:.0f} tokens/s")
        except Exception as error:
            report("FAIL", "cached_generation", f"{label}: {type(error).__name__} {str(error)[:150]}")


def compiled_generation() -> None:
    """Greedy tokens of CUDA graphs equal those without; a second text has another cache, and a batch another mask."""
    torch.manual_seed(0)
    greedy = SamplingConfig(temperature=0, top_k=None, top_p=None, min_p=None, repetition_penalty=1)
    model = prepare_for_inference(build_gpt(config(**SMALL)), "float32", DEVICE, int8=False, packed=False)
    graphs = build_decoder(model, compiled=True)
    for prompts in ([[1, 2, 3]], [[4, 5]], [[1, 2, 3], [4]]):
        options = {"seeds": row_seeds(0, len(prompts)), "max_new_tokens": 300, "device": DEVICE}  # more than a block
        texts = [
            collect_tokens(generate(model, prompts, greedy, decoder=decoder, **options))
            for decoder in (graphs, plain_decoder(model))
        ]
        same = sum(a == b for pair in zip(*texts, strict=True) for a, b in zip(*pair, strict=True))
        expect(same > 290 * len(prompts), "cached_generation", f"{same} of {300 * len(prompts)} tokens equal eager's")
    skips = dict(torch._dynamo.utils.counters["inductor"]).get("cudagraph_skips", 0)
    expect(skips == 0, "cached_generation", f"{skips} graphs run without CUDA graphs")


@torch.no_grad()
def cache_error(name: str) -> float:
    """Returns the largest difference of logits with and without the KV cache, over 40 tokens."""
    model = build_gpt(config(name, **SMALL)).to(DEVICE).eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    idx, cache = torch.randint(512, (2, 40), device=DEVICE), KVCache(4, 40)
    whole, slots, worst = model(idx), torch.arange(40, device=DEVICE), 0.0
    for at in range(40):
        position = CachePosition(slots[at : at + 1], None, at + 1, is_end=True)
        logits = model.next_logits(idx[:, at : at + 1], cache, position)
        worst = max(worst, (logits - whole[:, at]).abs().max().item())
    return worst


def generation_speed(*, int8: bool = False, compiled: bool = False) -> float:
    """Returns tokens per second of greedy generation, after a warm-up."""
    greedy = SamplingConfig(temperature=0, top_k=None, top_p=None, min_p=None, repetition_penalty=1)
    many = 200 if CUDA else 4
    model = build_gpt(config() if CUDA else config(**SMALL))
    model = prepare_for_inference(model, "bfloat16", DEVICE, int8=int8, packed=True)
    options = {"decoder": build_decoder(model, compiled=compiled), "device": DEVICE}
    took = 0.0
    for tokens in (many if compiled else 4, many):
        start = time.perf_counter()
        rows = generate(model, [[1, 2, 3]], greedy, seeds=row_seeds(0, 1), max_new_tokens=tokens, **options)
        collect_tokens(rows)
        took = time.perf_counter() - start
    return many / took


@check
def int8_matmuls() -> None:
    torch.manual_seed(0)
    width = 768 if CUDA else 128
    linear = torch.nn.Linear(width, 4 * width).to(DEVICE, BF16)
    int8 = Int8Linear(linear)
    for rows in (1, 16, 64):
        x = torch.randn(rows, width, device=DEVICE, dtype=BF16)
        error = relative_difference(int8(x), linear(x))
        times = [milliseconds(lambda layer=layer, x=x: layer(x)) for layer in (int8, linear)]
        text = f"{rows} rows: relative difference {error:.1e}, {times[0]:.3f} ms; bfloat16 {times[1]:.3f} ms"
        expect(error < 2e-2, "int8_matmuls", text)


@check
def delayed_all_reduce() -> None:
    sums = DelayedAllReduce()
    got = [sums.add(torch.full((3,), float(i), device=DEVICE)) for i in range(3)] + [sums.collect()]
    expect(got == [None, [0.0] * 3, [1.0] * 3, [2.0] * 3], "delayed_all_reduce", f"sums arrive one step later: {got}")


@check
def mixed_devices() -> None:
    """A loss on the GPU and a gradient norm on the CPU, as with trainer.cpu_offload=true."""
    module = GPTModule.__new__(GPTModule)
    torch.nn.Module.__init__(module)
    module._device = torch.device(DEVICE)
    module.step_loss, module.bad_step = torch.ones((), device=DEVICE), torch.zeros(())
    step_sync, reports = StepSync(), list[StepReport]()
    step_sync.listeners.append(reports.append)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_step=1)
    step_sync.on_train_batch_end(trainer, module, None, None, 0)
    step_sync.collect()
    expect(reports == [StepReport(1, 1.0, False)], "mixed_devices", f"reported: {reports}")


@check
def aborted_group() -> None:
    """A group on a GPU is aborted after an error; on a CPU it remains."""
    backend, store = "cpu:gloo,cuda:nccl" if CUDA else "gloo", dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    with suppress(ValueError), abort_group_on_error():
        dist.all_reduce(torch.ones((), device=DEVICE))
        raise ValueError
    expect(dist.is_initialized() != CUDA, "aborted_group", f"initialized after an error: {dist.is_initialized()}")
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    for name in sys.argv[1:] or CHECKS:
        start = time.perf_counter()
        try:
            CHECKS[name]()
        except Exception as error:
            report("FAIL", name, f"{type(error).__name__}: {str(error)[:200]}")
            traceback.print_exc()
        print(f"     ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
