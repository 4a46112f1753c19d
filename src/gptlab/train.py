"""Trains a model: python -m gptlab.train [group=option ...] [key=value ...].

In Python, the module is called like a function: ``gptlab.train(["group=option", "key=value"])``.
"""

import logging
import os
import sys
from pathlib import Path
from types import ModuleType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gptlab.config.base import known_keys
from gptlab.config.command import command
from gptlab.config.resolve import AUTO, add_keys_of_run, resolve
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.exit_codes import RESULT
from gptlab.launch.launcher import launch
from gptlab.launch.supervisor import exit_with_parent
from gptlab.launch.train_process import train
from gptlab.sweeps.config import SlurmLauncherConfig, SweeperConfig
from gptlab.tracking.run_store.runs import CONFIG
from gptlab.training.distributed.processes import is_first_rank, is_restarted
from gptlab.worker import extra_callbacks

log = logging.getLogger("gptlab.train")  # not __name__, which is "__main__" here


KEYS = {
    *known_keys(RunConfig),
    *known_keys(SweeperConfig, "hydra.sweeper."),
    *known_keys(SlurmLauncherConfig, "hydra.launcher."),
}


@command("train", keys=KEYS, rewrite=add_keys_of_run)
def main(values: DictConfig) -> int:
    """Validates the configuration and trains."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        run_dir = _given_run_dir(hydra.run.dir, values)
        config = resolve(values, list(hydra.overrides.task))
        return launch(config, run_dir, extra_callbacks=extra_callbacks)
    config = resolve(values, list(hydra.overrides.task))
    log.info("trial %s of the sweep: %s", hydra.job.num, " ".join(hydra.overrides.task))
    run_dir = Path(hydra.runtime.output_dir)  # hydra/sweeper=basic
    return launch(config, run_dir, extra_callbacks=extra_callbacks, in_process=False)


def _given_run_dir(given: str, values: DictConfig) -> Path | None:
    """Returns the run directory that ``hydra.run.dir`` sets, or None if gptlab is to create one.

    Raises:
        UserError: The directory is not empty, and the run in it, if any, is not to be resumed.
    """
    if given == "." or values.resume not in (None, AUTO):
        return None
    run_dir, is_resumed = Path(given).absolute(), values.resume == AUTO or is_restarted()
    values.resume = None  # ``launch`` resumes the run in an assigned directory
    if not is_first_rank() or (is_resumed and (run_dir / CONFIG).is_file()):
        return run_dir
    if (run_dir / CONFIG).is_file():
        raise UserError(f"hydra.run.dir={given} has a run. To resume it: resume={given}")
    if any(run_dir.iterdir()):
        raise UserError(f"hydra.run.dir={given} is not empty. A run needs a directory of its own.")
    return run_dir


class _CallableModule(ModuleType):
    """Module that trains a run when it is called, since ``gptlab.train`` names both the command and the function."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    if RESULT in os.environ:  # started by gptlab.train(...)
        exit_with_parent()
    main()
