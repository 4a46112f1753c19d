"""Hydra plugins of gptlab: sweeper and launchers, implemented in gptlab.sweeps."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class GptlabSweeper(Sweeper):
    """Sweeper that runs the trials of a sweep; configured by conf/hydra/sweeper/gptlab.yaml."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Stores the Hydra context and the configuration from which trials are composed."""
        self.hydra_context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        """Runs every trial that has not ended yet and prints the results."""
        from gptlab.sweeps.sweeper import run_sweep  # lazy: Hydra imports this module for every command

        launcher = OmegaConf.to_container(self.config.hydra.launcher, resolve=True)
        run_sweep(self.hydra_context, self.config, arguments, self.settings, launcher)


class _SweepLauncher(Launcher):
    """Base class of launchers for gptlab's sweeper, which starts and resumes the trials itself."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Does nothing; the sweeper configures the launcher."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises HydraException: these launchers need ``hydra/sweeper=gptlab``."""
        raise HydraException(
            "hydra/launcher=processes and hydra/launcher=slurm require hydra/sweeper=gptlab. Other launchers require "
            "hydra/sweeper=basic."
        )


class ProcessLauncher(_SweepLauncher):
    """Launcher that runs each trial in its own local process; configured by conf/hydra/launcher/processes.yaml."""


class SlurmLauncher(_SweepLauncher):
    """Launcher that runs each trial as a SLURM job; configured by conf/hydra/launcher/slurm.yaml."""
