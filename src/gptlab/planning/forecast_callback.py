"""Callback that writes the forecast of a run at its start and scores the forecast at its end."""

import lightning as L

from gptlab.launch.train_run import ExtraCallback, RunContext
from gptlab.planning.forecast import score_forecast, write_forecast
from gptlab.training.devices import peak_memory


class ForecastCallback(ExtraCallback):
    """Writes forecast.json at the start of a run, and adds the measured values at the end. Used on rank 0 only.

    Args:
        run: Context of the run.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        write_forecast(run.run_dir, run.config, run.manifest, run.devices)

    def summary(self, trainer: L.Trainer) -> dict[str, str]:
        """Scores the forecast and returns rows for the summary table of the run."""
        module, run = trainer.lightning_module, self.run
        measured = {
            "parameters": float(sum(parameter.numel() for parameter in module.parameters())),
            # not the device of the module: Lightning's teardown has moved it to the CPU
            "peak_memory_bytes": float(peak_memory(trainer.strategy.root_device)),
            "seconds": run.recorder.seconds if trainer.global_step >= run.config.steps else None,
        }
        return score_forecast(run.run_dir, run.config, run.manifest, run.devices, measured)
