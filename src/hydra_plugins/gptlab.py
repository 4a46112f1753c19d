"""Where Hydra looks for plugins. What they do is in gptlab.sweeps."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class GptlabSweeper(Sweeper):
    """Runs the trials of a sweep; its settings are those of conf/hydra/sweeper/gptlab.yaml."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a trial's configuration is composed with."""
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        """Run every trial that has not ended yet, and tell what came of it."""
        from gptlab.sweeps.sweeper import run_sweep  # Hydra imports this module for every command

        launcher = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)
        run_sweep(self.hydra_context, self.config, arguments, self.settings, launcher)


class _OfSweeper(Launcher):
    """A launcher that only the sweeper of gptlab can use: it gives each trial a place, and takes it up again."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing is needed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Refuse."""
        raise HydraException("hydra/launcher=processes and slurm belong to hydra/sweeper=gptlab; others have basic")


class ProcessLauncher(_OfSweeper):
    """Each trial in a process of its own on this machine; conf/hydra/launcher/processes.yaml."""


class SlurmLauncher(_OfSweeper):
    """Each trial a job of SLURM; conf/hydra/launcher/slurm.yaml."""
