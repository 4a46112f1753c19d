"""Decisions about devices, and the MFU: never a wrong number."""

import pytest
import torch

from conftest import defaults, tiny_config
from gptlab.errors import UserError
from gptlab.model.config import flops_per_token
from gptlab.training import devices
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.devices import Devices, choose_devices

TRAIN = TrainConfig(**defaults("train.yaml")["train"])
AUTO = defaults("trainer/auto.yaml") | {"devices": "auto", "strategy": "ddp"}


@pytest.fixture
def gpus(monkeypatch):
    """A machine with four H100, as torch would describe it."""
    for name, value in {
        "is_available": True,
        "device_count": 4,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "is_bf16_supported": True,
        "get_device_capability": (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setenv("CC", "cc")


def test_a_gpu_machine_uses_what_it_has(gpus):
    chosen = choose_devices(TrainerConfig(**AUTO), TRAIN)
    assert chosen == Devices("cuda", "NVIDIA H100 80GB HBM3", 4, 1, "bf16-mixed", compile=True)
    assert chosen.peak_flops() == 989.4e12


def test_what_is_named_is_what_is_used(gpus):
    named = AUTO | {"accelerator": "cpu", "devices": 2, "precision": "bf16-true"}
    chosen = choose_devices(TrainerConfig(**named), TRAIN.model_copy(update={"compile": True}))
    assert (chosen.accelerator, chosen.devices, chosen.precision, chosen.compile) == ("cpu", 2, "bf16-true", True)


def test_more_gpus_than_there_are_are_refused(gpus):
    with pytest.raises(UserError, match=r"trainer.devices=8: this machine has 4 GPUs"):
        choose_devices(TrainerConfig(**AUTO | {"devices": 8}), TRAIN)


def test_an_old_gpu_computes_in_float32_and_a_machine_without_compiler_does_not_compile(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(devices.shutil, "which", lambda _: None)
    chosen = choose_devices(TrainerConfig(**AUTO), TRAIN)
    assert (chosen.precision, chosen.compile) == ("32-true", False)


def test_several_machines_need_someone_who_starts_them():
    with pytest.raises(UserError, match="started by torchrun or srun"):
        choose_devices(TrainerConfig(**AUTO | {"num_nodes": 2}), TRAIN)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, (2, 3)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, (4, 2)),
    ],
)
def test_torchrun_and_slurm_say_how_many_there_are(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = choose_devices(TrainerConfig(**AUTO | {"accelerator": "cpu"}), TRAIN)
    assert (chosen.devices, chosen.num_nodes) == expected


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", None),  # TF32 or not: not known for certain
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
        ("NVIDIA RTX A1000", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
    ],
)
def test_a_peak_is_known_for_the_whole_name_or_not_at_all(name, precision, peak):
    assert Devices("cuda", name, 1, 1, precision, compile=False).peak_flops() == peak


def test_a_cpu_has_no_published_peak():
    assert Devices("cpu", "AVX512", 1, 1, "bf16-mixed", compile=False).peak_flops() is None


def test_mfu_by_hand():
    # PaLM, appendix B: observed tokens a second over those at which the peak would be reached
    flops = flops_per_token(tiny_config())
    assert flops == 6 * (61 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64) + 12 * 2 * 32 * 16


def test_only_the_step_of_slurm_counts(monkeypatch):
    numbers = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}  # one task of a larger job
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    assert choose_devices(TrainerConfig(**AUTO | {"accelerator": "cpu"}), TRAIN).devices == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(UserError, match="3 tasks on 2 nodes"):
        choose_devices(TrainerConfig(**AUTO | {"accelerator": "cpu"}), TRAIN)
