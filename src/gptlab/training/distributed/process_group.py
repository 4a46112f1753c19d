"""The process group of a run: joined before anything is written, so that all ranks agree on what is."""

import atexit
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

from gptlab.errors import UserError
from gptlab.training.distributed.clusters import cluster_environment
from gptlab.training.distributed.processes import RENDEZVOUS, global_rank, is_first_rank, is_worker
from gptlab.training.hardware import Hardware

T = TypeVar("T")


def join_group(devices: Hardware) -> None:
    """Wait for the other ranks of the run; Lightning then takes the group as it is.

    On one machine the ranks find each other in a file, so that nothing listens to the network; under torchrun and srun
    at the address that these have named.
    """
    if dist.is_initialized() or not (is_worker() or devices.world_size > 1):
        return
    if is_worker():
        method = f"file://{os.environ[RENDEZVOUS]}"
    else:
        environment = cluster_environment()
        os.environ["MASTER_ADDR"] = environment.main_address
        os.environ["MASTER_PORT"] = str(environment.main_port)
        method = "env://"
    device = None
    if devices.accelerator == "cuda":
        device = torch.device("cuda", cluster_environment().local_rank())
        torch.cuda.set_device(device)
        atexit.register(_leave_group)  # which NCCL asks for
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device else "gloo",  # what is kept on the CPU is summed there
        init_method=method,
        rank=global_rank(),
        world_size=devices.world_size,
        timeout=default_pg_timeout,
        device_id=device,
    )


def run_on_first_rank(make: Callable[[], T]) -> T:
    """Call ``make`` on the first rank; every rank returns what that returned, or raises the UserError it raised."""
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
    return made[0]  # type: ignore[return-value]  # what make returned, None included


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
