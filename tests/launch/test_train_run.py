"""Checks at the start of a run that need its devices."""

from contextlib import nullcontext

import pytest
import torch

from configs import resolved
from gptlab.errors import UserError
from gptlab.launch.train_run import _check_graphs, _warn_about_threads
from gptlab.tracking.environment import read_threads, record_environment
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
