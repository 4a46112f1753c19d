"""Callbacks that forecast a run: its forecast, which is scored at the end, and advice if it runs out of memory."""

import lightning as L

from gptlab.errors import UserError
from gptlab.launch.train_run import ExtraCallback, RunContext
from gptlab.planning.forecast import score_forecast, write_forecast
from gptlab.planning.memory import largest_micro_batch
from gptlab.planning.plans import plan_layout
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


class MemoryAdvice(ExtraCallback):
    """Names the micro-batch size that fits, according to the forecast, if a run is out of memory. Used on every rank.

    Args:
        run: Context of the run.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def memory_advice(self) -> str:
        """Returns a sentence that says what to change."""
        config, devices = self.run.config, self.run.devices
        layout = plan_layout(config, devices)
        largest = largest_micro_batch(config, devices, layout, config.loss_chunk(devices))
        current = config.train.plan(layout.copies).micro_batch_size
        if largest is None:
            return f"Use a smaller one; the memory of {devices.name} is not in gptlab's table."
        if largest >= current:
            return (
                f"Use a smaller one. According to the forecast, up to {largest} fit on {devices.name}: check whether "
                "other processes use its memory."
            )
        for size in range(largest, 0, -1):
            try:
                config.train.model_copy(update={"micro_batch_size": size}).plan(layout.copies)
            except UserError:  # does not divide the batch
                continue
            return f"According to the forecast, train.micro_batch_size={size} fits on {devices.name}."
        return (
            f"According to the forecast, not even 1 fits on {devices.name}. model.activation_checkpointing=true or "
            "trainer=fsdp needs less."
        )
