"""Checks at the start of a run that need its devices."""

from contextlib import nullcontext

import pytest
import torch

from configs import resolved
from gptlab.errors import OutOfMemory, UserError
from gptlab.launch.train_run import _check_graphs, _explaining_memory, _warn_about_threads
from gptlab.tracking.environment import read_threads, record_environment
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.hardware import Hardware

FSDP = ("trainer=fsdp", "trainer.devices=2", "train.global_batch_size=8", "train.compile_mode=reduce-overhead")


@pytest.mark.parametrize(
    ("changes", "accelerator", "compile_target", "refused"),
    [
        (("train.micro_batch_size=2",), "cuda", "blocks", True),
        (("train.micro_batch_size=4",), "cuda", "blocks", False),
        (("train.micro_batch_size=2",), "cuda", False, False),
        (("train.micro_batch_size=2",), "cpu", "blocks", False),
        (("train.micro_batch_size=2", "trainer=ddp"), "cuda", "whole", False),
        (("train.micro_batch_size=2", "train.compile_mode=max-autotune-no-cudagraphs"), "cuda", "blocks", False),
    ],
)
def test_cuda_graphs_with_gradients_that_fsdp_accumulates_are_refused(changes, accelerator, compile_target, refused):
    config = resolved(*FSDP, *changes)
    hardware = Hardware(accelerator, "", 2, 1, "32-true", compile=compile_target)
    message = r"train\.compile_mode=reduce-overhead: .* over 2 micro-batches"
    with pytest.raises(UserError, match=message) if refused else nullcontext():
        _check_graphs(config, hardware, config.train.plan(2))


def test_resuming_with_another_number_of_threads_is_a_warning(tmp_path, monkeypatch, caplog):
    _warn_about_threads(tmp_path)  # a run of an earlier version has no record
    record_environment(tmp_path)
    assert read_threads(tmp_path) == torch.get_num_threads()
    _warn_about_threads(tmp_path)
    assert caplog.text == ""
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    _warn_about_threads(tmp_path)
    assert f"threads per process is {before + 1}, but was {before}" in caplog.text
    assert f"OMP_NUM_THREADS={before}" in caplog.text


def full_cpu():
    torch.empty(10**16)


def full_gpu():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB."
    )


def full_driver():
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def full_python():
    raise MemoryError


@pytest.mark.parametrize(
    ("allocate", "message"),
    [
        (
            full_cpu,
            r"micro_batch_size=3 .* the machine of rank 0 has \(.* can't allocate memory: you tried to allocate",
        ),
        (full_gpu, r"micro_batch_size=3 .* the GPU of rank 0 has \(CUDA out of memory. Tried to allocate 2.00 GiB\)"),
        (full_driver, r"the GPU of rank 0 has \(CUDA error: out of memory\)"),
        (full_python, r"the machine of rank 0 has \(MemoryError\)"),
    ],
)
def test_every_lack_of_memory_names_the_micro_batch_size(allocate, message):
    with pytest.raises(OutOfMemory, match=message), _explaining_memory(BatchPlan(1, 3, 1), []):
        allocate()


def test_other_errors_of_a_run_remain():
    with pytest.raises(RuntimeError, match="size of tensor"), _explaining_memory(BatchPlan(1, 3, 1), []):
        torch.ones(2) + torch.ones(3)
