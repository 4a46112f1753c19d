"""Cluster environment and process group of a run."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator
from torch.distributed.distributed_c10d import _abort_process_group, default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from gptlab.errors import Diverged, UserError
from gptlab.training.devices import sees_one_gpu
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


class OneGPU(CUDAAccelerator):
    """Lightning's accelerator in a task that sees only its own GPU, whose index is then 0 on every rank.

    Lightning's own uses the index ``local_rank``, and requires that each process sees all GPUs of the run.
    """

    device = torch.device("cuda", 0)

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Returns the local ranks of ``devices`` processes."""
        return list(range(int(devices)))  # type: ignore[arg-type]  # a number: see ``Hardware.devices``

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """Returns the device of each local rank, as that rank sees it."""
        return [OneGPU.device for _ in devices]


def accelerator_for(hardware: Hardware) -> Accelerator | str:
    """Returns the accelerator for Lightning's Trainer."""
    return OneGPU() if hardware.accelerator == "cuda" and sees_one_gpu() else hardware.accelerator


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
        device = OneGPU.device if sees_one_gpu() else torch.device("cuda", cluster_environment().local_rank())
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


@contextmanager
def abort_group_on_error() -> Iterator[None]:
    """Aborts the collectives of this process after an error, if it trains on a GPU with others.

    ``destroy_process_group`` would wait for the other ranks, which wait for this one in a collective until their
    timeout. torch has no public function that aborts all groups, those of FSDP's meshes included, as NCCL requires: in
    one NCCL group (read in torch 2.13). All ranks diverge at the same step, so nothing is aborted then.
    """
    try:
        yield
    except Diverged:
        raise
    except BaseException:
        if dist.is_initialized() and torch.cuda.is_initialized():
            _abort_process_group()
        raise


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
