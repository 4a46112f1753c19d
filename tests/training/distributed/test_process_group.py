"""The cluster environment and accelerator passed to Lightning, and the process group after an error."""

import subprocess
import sys
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from gptlab.training.distributed import process_group
from gptlab.training.distributed.process_group import SrunEnvironment, cluster_environment
from gptlab.training.hardware import Hardware


@pytest.fixture
def step(monkeypatch):
    """A job step of two tasks in a job of eight, as started by ``srun --ntasks=2``."""
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)


def test_srun_environment_accepts_ntasks_which_lightning_rejects(step):
    with pytest.raises(RuntimeError, match="ntasks"):
        SLURMEnvironment(auto_requeue=False)
    environment = cluster_environment()
    assert isinstance(environment, SrunEnvironment)
    assert environment.world_size() == 2


@pytest.mark.parametrize("strategy", [DDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize(("gpus", "index"), [(1, 0), (2, 1)])
def test_the_device_of_a_task_is_0_if_it_sees_only_its_own_gpu(step, monkeypatch, strategy, gpus, index):
    for name, value in {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5"[: 2 * gpus - 1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # set by join_group
        monkeypatch.setenv(name, "0")
    joined: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: joined.update(current=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.update(options))
    monkeypatch.setattr(process_group, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(process_group.atexit, "register", lambda _: None)
    hardware = Hardware("cuda", "NVIDIA H100 80GB HBM3", 2, 1, "32-true", compile=False)
    process_group.join_group(hardware)
    trainer = L.Trainer(
        accelerator=process_group.accelerator_for(hardware),
        devices=2,
        strategy=strategy(),
        plugins=[cluster_environment()],
        logger=False,
        enable_checkpointing=False,
    )
    device = torch.device("cuda", index)
    assert joined["current"] == joined["device_id"] == trainer.strategy.root_device == device
    assert (trainer.world_size, trainer.global_rank) == (2, 1)


FAILS = """
import sys
import time
import torch
import torch.distributed as dist
from gptlab.errors import Diverged
from gptlab.training.distributed.process_group import abort_group_on_error
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.cuda.is_initialized = lambda: True
try:
    with abort_group_on_error():
        raise Diverged
except Diverged:
    assert dist.is_initialized()
dist.all_reduce(torch.ones(()))
try:
    with abort_group_on_error():
        if rank == 0:
            raise ValueError
        dist.all_reduce(torch.ones(()))  # waits for rank 0, which does not end
except Exception as error:
    print(type(error).__name__, dist.is_initialized(), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_collectives_of_the_others(tmp_path):
    commands = [(sys.executable, "-c", FAILS, str(rank), str(tmp_path / "store")) for rank in range(2)]
    ranks = [subprocess.Popen(one, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for one in commands]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ValueError False\n", "RuntimeError False\n"]
    finally:
        for rank in ranks:
            rank.communicate(timeout=60)
