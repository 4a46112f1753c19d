"""Which environment starts the processes, as Lightning is told."""

import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from gptlab.training.distributed.process_group import SrunEnvironment, cluster_environment


@pytest.fixture
def step(monkeypatch):
    """A step of two tasks in a job of eight, as ``srun --ntasks=2`` starts it."""
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)


def test_a_step_by_its_number_of_tasks_is_taken_which_lightning_refuses(step):
    with pytest.raises(RuntimeError, match="ntasks"):
        SLURMEnvironment(auto_requeue=False)
    environment = cluster_environment()
    assert isinstance(environment, SrunEnvironment)
    assert environment.world_size() == 2
