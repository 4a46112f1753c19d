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
from gptlab.config.resolve import add_keys_of_run, resolve
from gptlab.config.schema import RunConfig
from gptlab.exit_codes import RESULT
from gptlab.launch.launcher import launch
from gptlab.launch.supervisor import exit_with_parent
from gptlab.launch.train_process import train
from gptlab.worker import extra_callbacks

log = logging.getLogger("gptlab.train")  # not __name__, which is "__main__" here


@command("train", keys=set(known_keys(RunConfig)), rewrite=add_keys_of_run)
def main(values: DictConfig) -> int:
    """Validates the configuration and trains."""
    hydra = HydraConfig.get()
    config = resolve(values, list(hydra.overrides.task))
    if hydra.mode != RunMode.MULTIRUN:
        return launch(config, run_dir=None, extra_callbacks=extra_callbacks)
    log.info("trial %s of the sweep: %s", hydra.job.num, " ".join(hydra.overrides.task))
    run_dir = Path(hydra.runtime.output_dir)  # hydra/sweeper=basic
    return launch(config, run_dir, extra_callbacks=extra_callbacks, in_process=False)


class _CallableModule(ModuleType):
    """Module that trains a run when it is called, since ``gptlab.train`` names both the command and the function."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    if RESULT in os.environ:  # started by gptlab.train(...)
        exit_with_parent()
    main()
