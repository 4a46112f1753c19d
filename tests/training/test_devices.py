"""Choice of devices, precision and compilation; peak FLOP/s and peak memory."""

import itertools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import defaults, tiny_config
from gptlab.errors import UserError
from gptlab.model.config import flops_per_token
from gptlab.training import devices, hardware
from gptlab.training.config import TrainConfig, TrainerConfig
from gptlab.training.devices import choose_devices
from gptlab.training.distributed.processes import check_cpu_processes
from gptlab.training.hardware import GPUS, Hardware, gpu_from_name, resolve_loss_chunk

MODEL = tiny_config()
MB = 10**6
TRAIN = TrainConfig(**defaults("train.yaml")["train"])
AUTO = defaults("trainer/auto.yaml") | {"devices": "auto", "strategy": "ddp"}


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch report four H100 GPUs."""
    for name, value in {
        "is_available": True,
        "device_count": 4,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "is_bf16_supported": True,
        "get_device_capability": (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setenv("CC", "cc")


def test_auto_uses_all_gpus_with_bfloat16_and_compilation(gpus):
    chosen = choose_devices(TrainerConfig(**AUTO), TRAIN, MODEL)
    assert chosen == Hardware("cuda", "NVIDIA H100 80GB HBM3", 4, 1, "bf16-mixed", compile="whole")
    assert chosen.peak_flops() == 989.4e12


def test_explicit_values_are_used(gpus):
    named = AUTO | {"accelerator": "cpu", "devices": 2, "precision": "bf16-true"}
    chosen = choose_devices(TrainerConfig(**named), TRAIN.model_copy(update={"compile": True}), MODEL)
    assert (chosen.accelerator, chosen.devices, chosen.precision, chosen.compile) == ("cpu", 2, "bf16-true", "whole")


@pytest.mark.parametrize(
    ("strategy", "wanted", "expected"),
    [
        ("ddp", "blocks", "blocks"),
        ("fsdp", "auto", "blocks"),
        ("fsdp", True, "blocks"),
        ("fsdp", False, False),
    ],
)
def test_blocks_are_compiled_separately_if_configured_or_if_the_model_is_sharded(gpus, strategy, wanted, expected):
    trainer = TrainerConfig(**AUTO | {"strategy": strategy})
    assert choose_devices(trainer, TRAIN.model_copy(update={"compile": wanted}), MODEL).compile == expected


def test_more_gpus_than_available_raise(gpus):
    with pytest.raises(UserError, match=r"trainer.devices=8: this machine has 4 GPUs"):
        choose_devices(TrainerConfig(**AUTO | {"devices": 8}), TRAIN, MODEL)


def test_auto_is_float32_on_an_old_gpu_and_no_compilation_without_a_compiler(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(hardware.shutil, "which", lambda _: None)
    chosen = choose_devices(TrainerConfig(**AUTO), TRAIN, MODEL)
    assert (chosen.precision, chosen.compile) == ("32-true", False)


def test_several_nodes_need_a_launcher():
    with pytest.raises(UserError, match="with torchrun or srun"):
        choose_devices(TrainerConfig(**AUTO | {"num_nodes": 2}), TRAIN, MODEL)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, (2, 3)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, (4, 2)),
    ],
)
def test_torchrun_and_slurm_set_the_number_of_devices_and_nodes(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = choose_devices(TrainerConfig(**AUTO | {"accelerator": "cpu"}), TRAIN, MODEL)
    assert (chosen.devices, chosen.num_nodes) == expected


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", None),
        ("NVIDIA GH200 480GB", "bf16-mixed", 989.4e12),
        ("NVIDIA RTX 6000 Ada Generation", "bf16-mixed", 364.2e12),
        ("Tesla T4", "16-mixed", 65e12),
        ("Tesla T4", "bf16-mixed", None),  # which it does not have
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", None),
        ("NVIDIA RTX A1000", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
    ],
)
def test_peak_flops_are_known_only_for_full_names_in_16_bits(name, precision, peak):
    assert Hardware("cuda", name, 1, 1, precision, compile=False).peak_flops() == peak


LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa00)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-ab11)
  MIG 3g.20gb     Device  0: (UUID: MIG-c000)
  MIG 1g.5gb      Device  1: (UUID: MIG-c111)
GPU 2: Tesla T4 (UUID: GPU-bb22)
"""
H100, FIRST, SECOND, T4 = (
    "NVIDIA H100 80GB HBM3",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "Tesla T4",
)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (H100, FIRST, T4)),
        ("", ()),
        ("-1", ()),
        ("2,0", (T4, H100)),
        ("0, 7,2", (H100,)),  # the list ends at an invalid entry
        ("2,-1,0", (T4,)),
        ("0,0", ()),
        ("GPU-b,GPU-aa00", (T4, H100)),
        ("GPU-a", ()),  # ambiguous
        ("NoDevFiles", ()),
        ("MIG-c111", (SECOND,)),
        ("1", (FIRST,)),
    ],
)
def test_a_plan_is_for_the_gpus_that_cuda_visible_devices_permits(visible, expected, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ $1 = -L ] && cat <<'E'\n{LISTED}E\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    hardware.installed_gpus.cache_clear()
    try:
        assert hardware.list_gpus() == expected
        if visible is not None and "-" not in visible and "NoDev" not in visible:  # NVML, which torch asks, has no GPU
            indices = itertools.takewhile(lambda index: index < 3, torch.cuda._parse_visible_devices())
            assert expected == tuple((H100, FIRST, T4)[index] for index in indices)
        if not expected:
            with pytest.raises(UserError, match=f"no GPU .*CUDA_VISIBLE_DEVICES={visible}"):
                hardware.local_hardware(TrainerConfig(**AUTO | {"accelerator": "gpu"}), TRAIN, MODEL)
        else:
            planned = hardware.local_hardware(TrainerConfig(**AUTO), TRAIN, MODEL)
            assert (planned.name, planned.devices) == (expected[0], len(expected))
            assert planned.precision == ("32-true" if expected[0] == T4 else "bf16-mixed")
    finally:
        hardware.installed_gpus.cache_clear()


def test_tf32_is_used_only_if_configured_and_needs_a_gpu(gpus):
    wanted = TrainerConfig(**AUTO | {"precision": "32-true", "float32_matmul": "tf32"})
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        for trainer, allowed in ((wanted, True), (TrainerConfig(**AUTO), False)):
            devices.prepare_kernels(choose_devices(trainer, TRAIN, MODEL))
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")  # Lightning asks it
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = before
    with pytest.raises(UserError, match=r"float32_matmul=tf32 needs an NVIDIA GPU"):
        choose_devices(wanted.model_copy(update={"accelerator": "cpu"}), TRAIN, MODEL)


def test_the_docs_list_the_gpus_of_the_table():
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text().partition("data sheets: ")[2].partition(". ")[0]
    assert re.findall("`(.*?)`", text) == list(GPUS)


def test_peak_flops_of_a_cpu_are_unknown():
    assert Hardware("cpu", "AVX512", 1, 1, "bf16-mixed", compile=False).peak_flops() is None


def test_flops_per_token_match_the_formula():
    # PaLM, appendix B
    flops = flops_per_token(tiny_config())
    assert flops == 6 * (61 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64) + 12 * 2 * 32 * 16


def test_devices_and_nodes_are_those_of_the_slurm_step_not_of_the_job(monkeypatch):
    numbers = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}  # one task of a larger job
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    assert choose_devices(TrainerConfig(**AUTO | {"accelerator": "cpu"}), TRAIN, MODEL).devices == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(UserError, match="3 tasks on 2 nodes"):
        choose_devices(TrainerConfig(**AUTO | {"accelerator": "cpu"}), TRAIN, MODEL)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 flags")
def test_torch_reports_avx512_bf16():
    flags = hardware.read_cpuinfo()["flags"].split()
    assert torch.cpu.get_capabilities()["avx512_bf16"] == ("avx512_bf16" in flags)


def cpu(monkeypatch, *, bf16: bool, **changes):
    """Returns the hardware chosen on a CPU with a compiler; ``changes`` are those of the model, and ``trainer``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    monkeypatch.setenv("CC", "cc")
    single = AUTO | {"devices": 1, "strategy": "single"} | changes.pop("trainer", {})
    return choose_devices(TrainerConfig(**single), TRAIN, tiny_config(**changes))


def test_on_a_cpu_auto_is_bfloat16_and_compilation_for_wide_models(monkeypatch):
    wide = {"n_embd": 768, "n_head": 12}
    chosen = cpu(monkeypatch, bf16=True, **wide)
    assert (chosen.precision, chosen.compile) == ("bf16-mixed", "whole")
    chosen = cpu(monkeypatch, bf16=False, **wide)
    assert (chosen.precision, chosen.compile) == ("32-true", "whole")
    chosen = cpu(monkeypatch, bf16=True, n_embd=384, n_head=6)
    assert (chosen.precision, chosen.compile) == ("bf16-mixed", False)
    chosen = cpu(monkeypatch, bf16=True)
    assert (chosen.precision, chosen.compile) == ("32-true", False)
    chosen = cpu(monkeypatch, bf16=True, trainer={"strategy": "ddp"}, **wide)
    assert (chosen.precision, chosen.compile) == ("32-true", False)


@pytest.mark.parametrize("exact", [True, False])
def test_onednn_is_chosen_only_on_amd_and_only_if_exact(monkeypatch, exact):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(devices, "_is_exact", lambda: exact)
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        monkeypatch.setattr(devices, "read_cpuinfo", lambda vendor=vendor: {"vendor_id": vendor})
        expected = "onednn" if exact and vendor == "AuthenticAMD" else "default"
        assert cpu(monkeypatch, bf16=True).float32_matmul == expected
    named = cpu(monkeypatch, bf16=True, trainer={"float32_matmul": "default"})
    assert named.float32_matmul == "default"


def test_onednn_s_float32_matmuls_have_float32_precision():
    chosen = Hardware("cpu", "", 1, 1, "32-true", compile=False, float32_matmul="onednn")
    a, b = torch.randn(2, 300, 300).unbind()
    exact = a.double() @ b.double()
    if not devices._is_exact():  # on processors with AMX
        pytest.skip("oneDNN rounds to bfloat16 on this machine and is not chosen")
    try:
        devices.prepare_kernels(chosen)
        torch.testing.assert_close((a @ b).double(), exact, rtol=0, atol=2e-4)
    finally:
        devices.prepare_kernels(chosen._replace(float32_matmul="default"))
    torch.testing.assert_close((a @ b).double(), exact, rtol=0, atol=2e-4)


def test_auto_loss_chunk_is_64_mib_of_logits():
    chunk = resolve_loss_chunk("auto", tiny_config(vocab_size=50257, pad_vocab_to_multiple_of=64))
    assert 2**26 - 4 * 50304 < chunk * 50304 * 4 <= 2**26
    assert resolve_loss_chunk(7, MODEL) == 7
    assert resolve_loss_chunk(None, MODEL) is None


def test_auto_loss_chunk_on_a_gpu_is_the_whole_micro_batch_if_it_fits():
    model = tiny_config(vocab_size=50257, pad_vocab_to_multiple_of=64)

    def chunk(gpu, **changes):
        hardware = Hardware("cuda", gpu, 1, 1, "bf16-mixed", compile="whole")
        return resolve_loss_chunk("auto", model, hardware._replace(**changes))

    assert chunk(GPUS["h100"].name) >= 32 * 1024  # 6.6 GB of 80 GB in float32
    assert 4 * 50304 * chunk(GPUS["l4"].name) <= 24e9 / 8
    for small in (chunk("A GPU that is not in the table"), chunk(GPUS["l4"].name, compile="blocks")):
        assert small >= 8192
    assert chunk(GPUS["h100"].name, accelerator="cpu") == resolve_loss_chunk("auto", model)


def test_peak_memory_excludes_the_parent_process():
    """``ru_maxrss`` starts at the parent's value: for the child of a process of 800 MB, it would be 800 MB."""
    ballast = bytearray(800 * MB)  # written, and therefore resident
    child = "import torch; from gptlab.training.devices import peak_memory; print(peak_memory(torch.device('cpu')))"
    before = int(subprocess.check_output((sys.executable, "-c", child)))
    grown = child.replace("print", f"ballast = bytes(1) * {200 * MB}; print")
    assert len(ballast) == 800 * MB
    assert before < 600 * MB
    assert int(subprocess.check_output((sys.executable, "-c", grown))) - before == pytest.approx(200 * MB, abs=10 * MB)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not count mapped pages separately")
def test_peak_memory_excludes_mapped_files(tmp_path):
    path = tmp_path / "tokens.bin"
    path.write_bytes(bytes(200 * MB))
    child = f"""
import numpy as np, torch
from gptlab.training.devices import peak_memory
before = peak_memory(torch.device("cpu"))
tokens = np.memmap({str(path)!r}, np.uint8, "r")
assert tokens.sum() == 0
print(peak_memory(torch.device("cpu")) - before)
"""
    assert abs(int(subprocess.check_output((sys.executable, "-c", child)))) < 20 * MB


def test_nvlink_is_the_bandwidth_of_one_node_only():
    one_node = Hardware("cuda", "NVIDIA H100 80GB HBM3", 8, 1, "bf16-mixed", compile=False)
    assert one_node.gpu is GPUS["h100"]
    assert one_node.link_bandwidth == 450e9  # NVIDIA's data sheet: 900 GB/s in both directions
    assert one_node._replace(num_nodes=2).link_bandwidth is None
    assert one_node._replace(devices=9).link_bandwidth is None
    assert one_node._replace(name="NVIDIA L4").link_bandwidth is None


def test_gpu_from_name_accepts_two_names_and_suggests_the_nearest():
    assert gpu_from_name("NVIDIA H100 80GB HBM3") is gpu_from_name("H100") is GPUS["h100"]
    with pytest.raises(UserError, match=r"gpu=h1000 .* Did you mean h100\?"):
        gpu_from_name("h1000")


@pytest.mark.parametrize(
    ("given", "message"), [("many", "MAX_PROCESSES=many should be a number"), ("3", "at most .*=3,")]
)
def test_the_number_of_processes_on_a_cpu_is_limited(monkeypatch, given, message):
    monkeypatch.setenv("GPTLAB_MAX_PROCESSES", given)
    with pytest.raises(UserError, match=message):
        check_cpu_processes(4)
    monkeypatch.setenv("GPTLAB_MAX_PROCESSES", "4")
    check_cpu_processes(4)


def test_deterministic_algorithms_cover_cublas_and_attention(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        devices.use_deterministic_algorithms()
        # with warn_only, the backward passes of flash and memory-efficient attention are not deterministic
        assert torch.get_deterministic_debug_mode() == 2
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # the values that torch accepts
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("visible", [None, "2"])
def test_tasks_that_see_one_gpu_each_use_as_many_as_there_are_tasks(gpus, monkeypatch, visible):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(UserError, match=r"trainer.devices=4: this machine has 1 GPU\."):
            choose_devices(TrainerConfig(**AUTO), TRAIN, MODEL)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert choose_devices(TrainerConfig(**AUTO), TRAIN, MODEL).devices == 4


@pytest.mark.parametrize(
    "variables",
    [
        {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_GPUS_ON_NODE": "1"},
    ],
    ids=["torchrun", "srun"],
)
def test_more_processes_than_gpus_that_all_of_them_see_raise(gpus, monkeypatch, variables):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {**variables, "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"trainer.devices=4: this machine has 1 GPU\."):
        choose_devices(TrainerConfig(**AUTO), TRAIN, MODEL)
