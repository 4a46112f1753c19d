"""Peak memory by kind, against hand-computed values, and the hardware settings of a plan, against those of a run."""

import pytest
import torch

from configs import resolved
from gptlab.model.config import parameter_count
from gptlab.planning.memory import MemoryEstimate, ParallelLayout, estimate_memory, largest_micro_batch
from gptlab.planning.plans import make_plan, plan_hardware
from gptlab.training import hardware
from gptlab.training.devices import choose_devices
from gptlab.training.hardware import GPUS, resolve_loss_chunk

GPT2 = resolved("experiment=gpt2_openwebtext").with_vocabulary(50257)
N = 124_373_760
H100 = plan_hardware(GPT2, ["h100"])
CHUNK = resolve_loss_chunk(GPT2.train.loss_chunk, GPT2.model)


@pytest.mark.parametrize("model", ["nano", "mini", "gpt2"])
@pytest.mark.parametrize("bf16", [True, False])
def test_plan_resolves_the_hardware_settings_of_a_run(model, bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    monkeypatch.setattr(hardware, "list_gpus", lambda: ())
    monkeypatch.setattr(hardware, "read_cpuinfo", lambda: {"flags": "fpu avx512_bf16" if bf16 else "fpu"})
    for spread in ("trainer=auto", "trainer=ddp", "trainer=fsdp"):
        config = resolved(f"model={model}", spread, "tokenizer=bytes").with_vocabulary(257)
        chosen = choose_devices(config.trainer, config.train, config.model)
        assert plan_hardware(config, []) == chosen._replace(float32_matmul="default")  # only torch can resolve it


def test_weights_gradients_and_optimizer_state():
    adamw = estimate_memory(GPT2, H100, ParallelLayout("ddp", 8), 12, CHUNK)
    assert (adamw.weights, adamw.moments, adamw.gradients) == (4 * N, 8 * N, 4 * N)
    assert adamw.libraries == 0  # libraries do not use GPU memory
    assert estimate_memory(GPT2, plan_hardware(GPT2, []), ParallelLayout("ddp", 8), 12, None).libraries > 0
    sharded = estimate_memory(GPT2, H100, ParallelLayout("fsdp", 8), 12, CHUNK)
    assert (sharded.weights, sharded.moments) == (4 * N / 8, N)
    assert sharded.gradients == 4 * N  # of five micro-batches, which FSDP accumulates whole
    once = estimate_memory(GPT2, H100, ParallelLayout("fsdp", 40), 12, CHUNK)
    assert once.gradients == 4 * 50304 * 768  # of the embedding, which FSDP reduces last; the others are sharded
    muon = resolved("experiment=gpt2_openwebtext", "optimizer=muon", "train.ema_decay=0.99").with_vocabulary(50257)
    assert estimate_memory(muon, H100, ParallelLayout("ddp", 8), 12, None).moments == 4 * (3 * N - 12 * 12 * 768**2)
    pure = H100._replace(precision="bf16-true")
    assert estimate_memory(GPT2, pure, ParallelLayout("ddp", 8), 12, None).weights == 2 * N


def test_options_of_fsdp_change_what_a_device_holds():
    spread, blocks = ParallelLayout("fsdp", 8), N - (50304 + 1024 + 1) * 768  # bfloat16, gathered by the device

    def estimate(*overrides: str) -> MemoryEstimate:
        config = resolved("experiment=gpt2_openwebtext", "trainer=fsdp", *overrides).with_vocabulary(50257)
        return estimate_memory(config, H100, spread, 12, CHUNK)

    assert estimate("trainer.reshard_after_forward=false").copies - estimate().copies == 2 * blocks * 10 / 12
    offloaded = estimate("trainer.cpu_offload=true")
    assert (offloaded.weights, offloaded.moments, offloaded.gradients) == (0, 0, 4 * N)


def test_lora_has_gradients_and_optimizer_state_of_the_added_matrices_alone():
    lora = resolved("experiment=gpt2_openwebtext", "lora=all", "init_from=gpt2").with_vocabulary(50257)
    added = 12 * lora.lora.rank * 768 * (4 + 2 + 5 + 5)
    ddp, single = (ParallelLayout("ddp", 8), ParallelLayout("single", 1))
    whole, adapted = (estimate_memory(config, H100, ddp, 12, CHUNK) for config in (GPT2, lora))
    assert (adapted.weights, adapted.moments, adapted.gradients) == (4 * (N + added), 8 * added, 4 * added)
    assert adapted.activations < whole.activations
    averaged = lora.model_copy(update={"train": lora.train.model_copy(update={"ema_decay": 0.99})})
    assert estimate_memory(averaged, H100, single, 12, CHUNK).moments == 12 * added


def test_checkpointing_chunks_and_tensor_parallelism_reduce_memory():
    plain = resolved("experiment=gpt2_openwebtext", "train.loss_chunk=null").with_vocabulary(50257)
    model = plain.model.model_copy(update={"activation_checkpointing": True})
    checkpointed = plain.model_copy(update={"model": model})
    spread = ParallelLayout("ddp", 8)
    whole = estimate_memory(plain, H100, spread, 12, None)
    assert estimate_memory(checkpointed, H100, spread, 12, None).activations < whole.activations / 2
    assert estimate_memory(plain, H100, spread, 12, 1024).total < whole.total - 12 * 1024 * 50257 * 2
    split = estimate_memory(plain, H100, ParallelLayout("fsdp_tp", 8, 2), 12, None)
    assert split.activations < estimate_memory(plain, H100, ParallelLayout("fsdp", 8), 12, None).activations


@pytest.mark.parametrize("gpu", ["h100", "l4"])
def test_largest_micro_batch_fits_and_one_more_does_not(gpu):
    machine, spread, chunk = plan_hardware(GPT2, [gpu]), ParallelLayout("single", 1), CHUNK
    largest = largest_micro_batch(GPT2, machine, spread, chunk)
    assert estimate_memory(GPT2, machine, spread, largest, chunk).total <= GPUS[gpu].memory
    assert estimate_memory(GPT2, machine, spread, largest + 1, chunk).total > GPUS[gpu].memory
    xl = resolved("model=gpt2-xl").with_vocabulary(50257)
    # 16 bytes per parameter, 1.6 billion parameters
    assert largest_micro_batch(xl, plan_hardware(xl, ["l4"]), spread, chunk) == 0


def test_plan_counts_parameters_tokens_and_flops():
    plan = make_plan(GPT2, None, ["h100"], 0.4, bandwidth=None)
    assert sum(plan.parameters.values()) == parameter_count(GPT2.model) == N
    assert plan.length.tokens == 600_000 * 491_520
    assert plan.flops == 600_000 * 491_520 * (6 * (N - 1024 * 768) + 12 * 12 * 768 * 1024)


def test_no_fragmentation_is_forecast_if_malloc_returns_freed_memory(monkeypatch):
    small = resolved("model=mini", "tokenizer=bytes").with_vocabulary(257)
    for threshold, expected in ((None, True), (2**25, True), (2**20, False)):
        monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
        if threshold:
            monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(threshold))
        found = estimate_memory(small, plan_hardware(small, []), ParallelLayout("single", 1), 4, None)
        assert (found.holes > 0) == expected
