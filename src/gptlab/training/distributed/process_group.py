"""Cluster environment and process group of a run."""

import atexit
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from gptlab.errors import UserError
from gptlab.training.distributed.processes import (
    RENDEZVOUS,
    global_rank,
    is_first_rank,
    is_worker,
    launched_by_srun,
    launched_by_torchrun,
)
from gptlab.training.hardware import Hardware

T = TypeVar("T")


def cluster_environment() -> ClusterEnvironment:
    """Returns the environment of this process's launcher, ignoring variables of a scheduler that did not start it."""
    if launched_by_torchrun():
        return TorchElasticEnvironment()
    if launched_by_srun():
        return SrunEnvironment()
    return LightningEnvironment()


class SrunEnvironment(SLURMEnvironment):
    """SLURM environment for any job step; Lightning's own accepts only --ntasks-per-node and steps of the full job."""

    def __init__(self) -> None:
        # Lightning's own requeue would save and load checkpoints in addition to those of the run
        super().__init__(auto_requeue=False)

    @property
    def main_address(self) -> str:
        """The address of the first node of this step."""
        if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) == 1:
            return "127.0.0.1"
        return os.environ.get("MASTER_ADDR") or self.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])

    @property
    def main_port(self) -> int:
        """A port that differs from those of other steps on the same node, below the range of ephemeral ports."""
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        return int(os.environ.get("MASTER_PORT", 10_000 + (job * 7 + step) % 20_000))

    def world_size(self) -> int:
        """Returns the number of tasks of this step."""
        return int(os.environ["SLURM_STEP_NUM_TASKS"])

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Accepts any values: they are read from the job step (``gptlab.training.distributed.processes``)."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """Also accepts ``srun --ntasks``, for which Lightning's constructor raises (read in lightning 2.6.6)."""


def join_group(hardware: Hardware) -> None:
    """Joins the process group of the run, which Lightning then uses. Does nothing in a run with a single process.

    On one machine the ranks rendezvous through a file, so no network port is opened. Under torchrun and srun they
    rendezvous at the address that the launcher provides.
    """
    if dist.is_initialized() or not (is_worker() or hardware.world_size > 1):
        return
    rank, size = global_rank(), hardware.world_size
    store, method = None, f"file://{os.environ[RENDEZVOUS]}" if is_worker() else None
    if method is None:
        environment = cluster_environment()
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        store, *_ = next(rendezvous("env://", rank, size, timeout=default_pg_timeout))
        # torchrun may keep the store when it restarts the processes, with the addresses of the earlier ones
        attempt = f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
    device = None
    if hardware.accelerator == "cuda":
        device = torch.device("cuda", cluster_environment().local_rank())
        torch.cuda.set_device(device)
        atexit.register(_leave_group)  # NCCL requires it
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device else "gloo",  # CPU tensors are reduced with Gloo
        init_method=method,
        store=store,
        rank=rank,
        world_size=size,
        timeout=default_pg_timeout,
        device_id=device,
    )


def run_on_first_rank(make: Callable[[], T]) -> T:
    """Calls ``make`` on the first rank; every rank returns its result, or raises its UserError."""
    if not dist.is_initialized():
        return make()
    made: list[T | UserError | None] = [None]
    if is_first_rank():
        try:
            made[0] = make()
        except UserError as error:
            made[0] = error
    dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], UserError):
        raise made[0]
    return made[0]  # type: ignore[return-value]  # the result of make, which may be None


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
