"""The callback that forecasts a run at its start and scores the forecast at its end."""

import lightning as L

from gptlab.launch.train_run import ExtraCallback, RunContext
from gptlab.planning.forecast import score_forecast, write_forecast
from gptlab.training.devices import peak_memory


class ForecastCallback(ExtraCallback):
    """Writes forecast.json, what the run is expected to need, and scores it when the run is done.

    Belongs on the first rank only.

    Args:
        run: The run that is about to train.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        write_forecast(run.run_dir, run.config, run.manifest, run.devices)

    def summary(self, trainer: L.Trainer) -> dict[str, str]:
        """Writes the score beside the forecast, and returns it as rows."""
        module, run = trainer.lightning_module, self.run
        measured = {
            "parameters": float(sum(parameter.numel() for parameter in module.parameters())),
            # the module's device is the CPU by now, where Lightning's teardown has moved it
            "peak_memory_bytes": float(peak_memory(trainer.strategy.root_device)),
            "seconds": run.recorder.seconds if trainer.global_step >= run.config.steps else None,
        }
        return score_forecast(run.run_dir, run.config, run.manifest, run.devices, measured)
