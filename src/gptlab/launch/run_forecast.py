"""A run's forecast: written at its start, scored at its end."""

from pathlib import Path

import lightning as L

from gptlab.config.schema import Config
from gptlab.data.shards.manifest import Manifest
from gptlab.planning.forecast import score_forecast, write_forecast
from gptlab.planning.target import Hardware, processor_name, total_memory
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.devices import Devices, peak_memory
from gptlab.training.gpu_specs import gpu_from_cuda_name


class Expectation:
    """What a run is expected to need.

    Args:
        directory: Of the run; forecast.json is written into it.
        config: Complete.
        manifest: Of the data.
        devices: What it computes on.
    """

    def __init__(self, directory: Path, config: Config, manifest: Manifest, devices: Devices) -> None:
        self.directory, self.config, self.manifest = directory, config, manifest
        self.target = _target(devices)
        write_forecast(directory, config, manifest, self.target)

    def outcome(self, recorder: MetricsCallback, trainer: L.Trainer) -> dict[str, str]:
        """Score it, when the run is done; return rows for the run's table."""
        module = trainer.lightning_module
        measured = {
            "parameters": float(sum(parameter.numel() for parameter in module.parameters())),
            "peak_memory_bytes": float(peak_memory(module.device)),
            "seconds": recorder.seconds if trainer.global_step >= self.config.steps else None,
        }
        return score_forecast(self.directory, self.config, self.manifest, self.target, measured)


def _target(devices: Devices) -> Hardware:
    """Describe what was chosen as a plan does."""
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
