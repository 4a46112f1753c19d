"""Callbacks of the forecast: the device whose memory is measured, and the advice to a run that is out of memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs import resolved
from gptlab.errors import OutOfMemory
from gptlab.exit_codes import FAILED, exit_status
from gptlab.launch.train_run import _explaining_memory
from gptlab.planning import forecast_callback
from gptlab.planning.forecast_callback import ForecastCallback, MemoryAdvice
from gptlab.planning.memory import estimate_memory
from gptlab.planning.plans import plan_hardware, plan_layout

# message of torch 2.13, shortened
CUDA_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.1 GiB"


def context(*overrides: str, gpu: str = "h100") -> Any:
    config = resolved("model=gpt2", "trainer=gpu", *overrides).with_vocabulary(50257)
    return SimpleNamespace(config=config, devices=plan_hardware(config, [gpu]), run_dir=None, manifest=None)


def test_peak_memory_is_that_of_the_training_device_after_teardown(monkeypatch):
    scored, run = {}, context()
    monkeypatch.setattr(forecast_callback, "write_forecast", lambda *_: None)
    monkeypatch.setattr(forecast_callback, "score_forecast", lambda *arguments: scored.update(arguments[-1]) or {})
    monkeypatch.setattr(forecast_callback, "peak_memory", lambda device: {"cuda": 7, "cpu": 1}[device.type])
    run.recorder = SimpleNamespace(seconds=1.0)
    trainer: Any = SimpleNamespace(
        lightning_module=torch.nn.Linear(2, 3),  # on the CPU, as after the teardown
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)),
        global_step=0,
    )
    ForecastCallback(run).summary(trainer)
    assert scored["peak_memory_bytes"] == 7.0


def test_advice_is_the_largest_micro_batch_of_the_batch_that_fits():
    run = context("train.global_batch_size=4096")

    def fits(size: int) -> bool:
        layout = plan_layout(run.config, run.devices)
        return estimate_memory(run.config, run.devices, layout, size, run.config.loss_chunk(run.devices)).total <= 80e9

    best = max(2**power for power in range(13) if fits(2**power))  # the divisors of the batch
    assert 1 < best < 4096
    assert f"train.micro_batch_size={best} fits on H100" in MemoryAdvice(run).memory_advice()


@pytest.mark.parametrize(
    ("overrides", "gpu", "sentence"),
    [
        (("train.global_batch_size=1",), "h100", "check whether other processes use its memory"),
        (("model=gpt2-xl", "train.global_batch_size=8"), "l4", "not even 1 fits on L4"),
        (("train.global_batch_size=8",), None, "is not in gptlab's table"),
    ],
)
def test_advice_without_a_smaller_size_that_fits(overrides, gpu, sentence):
    run = context(*overrides, gpu=gpu or "l4")
    if gpu is None:
        run.devices = run.devices._replace(name="NVIDIA Unknown")
    assert sentence in MemoryAdvice(run).memory_advice()


@pytest.mark.parametrize("rank", [0, 3])
def test_a_run_out_of_memory_ends_with_a_sentence_on_the_rank_that_is(monkeypatch, capsys, rank):
    for name, value in {"GPTLAB_RENDEZVOUS": "x", "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    run, plan = context("train.global_batch_size=4096"), SimpleNamespace(micro_batch_size=4096)

    def work() -> int:
        with _explaining_memory(plan, [MemoryAdvice(run)]):
            raise torch.OutOfMemoryError(CUDA_ERROR)

    with pytest.raises(OutOfMemory):
        work()
    assert exit_status(work) == FAILED
    printed = " ".join(capsys.readouterr().err.split())
    assert f"train.micro_batch_size=4096 needs more memory than the GPU of rank {rank} has" in printed
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB)" in printed
    assert "According to the forecast, train.micro_batch_size=" in printed
    assert "Traceback" not in printed
