"""Train a model: python -m gptlab.train [group=option ...] [key=value ...]."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gptlab.experiments.command import command
from gptlab.experiments.launching import launch
from gptlab.experiments.resuming import resolve
from gptlab.experiments.schema import Config, known_keys


@command("train", keys=set(known_keys(Config)))
def main(values: DictConfig) -> int:
    """Check the configuration, and run it."""
    hydra = HydraConfig.get()
    config = resolve(values, list(hydra.overrides.task))
    in_sweep = hydra.mode == RunMode.MULTIRUN
    return launch(config, Path(hydra.runtime.output_dir) if in_sweep else None)


if __name__ == "__main__":
    main()
