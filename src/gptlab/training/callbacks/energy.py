"""Energy and emissions of a run, measured by CodeCarbon without network access."""

from importlib.util import find_spec
from typing import Any, Literal

import lightning as L
import torch

from gptlab.errors import UserError, did_you_mean, install_extra
from gptlab.training.callbacks.checked_callback import CheckedCallback
from gptlab.training.callbacks.metrics import log_step_metrics
from gptlab.training.distributed.strategies import reduce_over_data_ranks


class Energy(CheckedCallback):
    """Logs energy_kwh and emissions_kg (CO2-equivalents) of the run so far at every evaluation.

    The first process of each node runs CodeCarbon's ``OfflineEmissionsTracker``, which writes emissions.csv to the run
    directory. CodeCarbon's own configuration cannot enable its outputs to the network.

    Args:
        country_iso_code: Country of the machine, three letters, from which the emissions per kWh are known.
        tracking_mode: "machine" measures the whole machine, "process" estimates the share of this process.
        measure_every: Seconds between measurements.

    Raises:
        UserError: CodeCarbon is not installed, or does not know the country.
    """

    evaluation_metrics = ("energy_kwh", "emissions_kg")

    def __init__(
        self, country_iso_code: str, tracking_mode: Literal["machine", "process"], measure_every: float
    ) -> None:
        if find_spec("codecarbon") is None:
            raise UserError(f"callbacks.energy needs the codecarbon package: {install_extra('codecarbon')}")
        from codecarbon.input import DataSource

        if country_iso_code not in (known := DataSource().get_global_energy_mix_data()):
            raise UserError(
                f"callbacks.energy.country_iso_code={country_iso_code} is not a country of CodeCarbon, such as USA or "
                f"DEU.{did_you_mean(country_iso_code, known)}"
            )
        self.country_iso_code, self.tracking_mode, self.measure_every = country_iso_code, tracking_mode, measure_every
        self._tracker: Any = None
        self._trainer: L.Trainer | None = None
        self._latest: Any = None  # has the kWh and kg of this node since the start
        self._earlier = (0.0, 0.0)  # kWh and kg of all nodes before this start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the tracker, if this is the first process of its node."""
        self._trainer = trainer
        if trainer.local_rank == 0:
            self._tracker = self._build_tracker(trainer.default_root_dir)
            self._tracker.start()

    def _build_tracker(self, directory: str) -> Any:
        from codecarbon import OfflineEmissionsTracker, OutputMethod
        from codecarbon.output_methods.base_output import BaseOutput

        class Latest(BaseOutput):
            energy = emissions = 0.0

            def out(self, total: Any, delta: Any) -> None:
                self.energy, self.emissions = total.energy_consumed, total.emissions

        self._latest = Latest()
        return OfflineEmissionsTracker(
            country_iso_code=self.country_iso_code,
            tracking_mode=self.tracking_mode,
            measure_power_secs=self.measure_every,
            output_dir=directory,
            output_methods=[OutputMethod.CSV],
            output_handlers=[self._latest],
            on_csv_write="update",
            emissions_endpoint=None,
            electricitymaps_api_token=None,
            allow_multiple_runs=True,
            log_level="error",
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the totals over all nodes."""
        energy, emissions = self._measure(trainer)
        log_step_metrics(trainer, {"energy_kwh": energy, "emissions_kg": emissions}, trainer.global_step)

    def _measure(self, trainer: L.Trainer) -> list[float]:
        """Returns kWh and kg of all nodes so far; every rank must call it."""
        own = (0.0, 0.0)
        if self._latest is not None:
            if self._tracker is not None:
                self._tracker.flush()
            own = (self._latest.energy, self._latest.emissions)
        device = trainer.strategy.root_device
        since = reduce_over_data_ranks(torch.tensor(own, device=device), trainer, "sum").tolist()
        return [before + now for before, now in zip(self._earlier, since, strict=True)]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the tracker."""
        if self._tracker is not None:
            self._tracker.stop()
            self._tracker = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops the tracker."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns kWh and kg so far; every rank must call it."""
        return {"total": list(self._earlier) if self._trainer is None else self._measure(self._trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores kWh and kg from before this start."""
        energy, emissions = state_dict["total"]
        self._earlier = (float(energy), float(emissions))
