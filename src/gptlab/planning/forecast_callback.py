"""The callback that forecasts a run at its start and scores the forecast at its end."""

import lightning as L

from gptlab.launch.train_run import ExtraCallback, RunContext
from gptlab.planning.forecast import score_forecast, write_forecast
from gptlab.planning.target import Hardware, processor_name, total_memory
from gptlab.training.devices import Devices, peak_memory
from gptlab.training.gpu_specs import gpu_from_cuda_name


class ForecastCallback(ExtraCallback):
    """Writes forecast.json, what the run is expected to need, and scores it when the run is done.

    Belongs on the first rank only.

    Args:
        run: The run that is about to train.
    """

    def __init__(self, run: RunContext) -> None:
        self.run, self.target = run, _target(run.devices)
        write_forecast(run.run_dir, run.config, run.manifest, self.target)

    def summary(self, trainer: L.Trainer) -> dict[str, str]:
        """Writes the score beside the forecast, and returns it as rows."""
        module, run = trainer.lightning_module, self.run
        measured = {
            "parameters": float(sum(parameter.numel() for parameter in module.parameters())),
            "peak_memory_bytes": float(peak_memory(module.device)),
            "seconds": run.recorder.seconds if trainer.global_step >= run.config.steps else None,
        }
        return score_forecast(run.run_dir, run.config, run.manifest, self.target, measured)


def _target(devices: Devices) -> Hardware:
    """Describes the devices as a plan does."""
    on_gpu = devices.accelerator == "cuda"
    gpu = gpu_from_cuda_name(devices.name) if on_gpu else None
    return Hardware(
        accelerator="cuda" if on_gpu else "cpu",
        name=devices.name if on_gpu else processor_name(),
        gpu=gpu,
        memory=(gpu.memory if gpu else None) if on_gpu else total_memory(),
        devices=devices.devices,
        nodes=devices.num_nodes,
        precision=devices.precision,
        compile=devices.compile,
        is_here=True,
    )
