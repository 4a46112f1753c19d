"""Train a model: python -m gptlab.train [group=option ...] [key=value ...]."""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gptlab.config.command import command
from gptlab.config.resume import resolve
from gptlab.config.schema import Config, known_keys
from gptlab.launch.launcher import launch

log = logging.getLogger("gptlab.train")  # not __name__, which is "__main__" here


@command("train", keys=set(known_keys(Config)))
def main(values: DictConfig) -> int:
    """Check the configuration, and run it."""
    hydra = HydraConfig.get()
    config = resolve(values, list(hydra.overrides.task))
    if hydra.mode != RunMode.MULTIRUN:
        return launch(config, place=None)
    log.info("job %s of the sweep: %s", hydra.job.num, " ".join(hydra.overrides.task))
    return launch(config, place=Path(hydra.runtime.output_dir), alone=False)  # hydra/sweeper=basic


if __name__ == "__main__":
    main()
