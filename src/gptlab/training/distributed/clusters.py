"""Who starts a run's processes, as Lightning wants to be told."""

import os

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from gptlab.training.distributed.processes import launched_by_srun, launched_by_torchrun


def cluster_environment() -> ClusterEnvironment:
    """Say who starts the processes: what started this one, not what variables a scheduler has left lying about."""
    if launched_by_torchrun():
        return TorchElasticEnvironment()
    if launched_by_srun():
        return SrunEnvironment()
    return LightningEnvironment()


class SrunEnvironment(SLURMEnvironment):
    """Lightning's, for a step of any shape: it takes only --ntasks-per-node, and the numbers of the whole job."""

    def __init__(self) -> None:
        # Lightning's own requeue would write checkpoints beside the run, and load them by itself
        super().__init__(auto_requeue=False)

    @property
    def main_address(self) -> str:
        """The first node of this step."""
        if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) == 1:
            return "127.0.0.1"
        return os.environ.get("MASTER_ADDR") or self.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])

    @property
    def main_port(self) -> int:
        """A port that other steps on the same node do not take, below those that systems give out by themselves."""
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        return int(os.environ.get("MASTER_PORT", 10_000 + (job * 7 + step) % 20_000))

    def world_size(self) -> int:
        """Tasks of this step."""
        return int(os.environ["SLURM_STEP_NUM_TASKS"])

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """See nothing wrong: the numbers are the step's (``gptlab.training.distributed.processes``)."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """Accepts ``srun --ntasks`` as well, for which Lightning's constructor raises (read in lightning 2.6.6)."""
