"""The cluster environment passed to Lightning."""

import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from gptlab.training.distributed.process_group import SrunEnvironment, cluster_environment


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
