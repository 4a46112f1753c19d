"""Loggers for MLflow and Trackio that keep one record per run directory, also when the run is resumed."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from gptlab.errors import UserError, install_extra
from gptlab.files import read_regular, write_file
from gptlab.tracking.run_store.runs import Run
from gptlab.training.distributed.processes import is_first_rank

MLFLOW_ID = "mlflow_id"  # file with MLflow's ID of a run


class RunMLFlowLogger(MLFlowLogger):
    """Lightning's ``MLFlowLogger``, which continues the record of a resumed run and does not use MLflow's telemetry.

    Args:
        experiment_name: Name of the experiment.
        run_name: Name of the run. None: that of the run directory.
        tracking_uri: MLflow's store: a database, a directory or a server.
        tags: Tags of the run.
        save_dir: Run directory.

    Raises:
        UserError: MLflow is not installed.
    """

    def __init__(
        self, experiment_name: str, run_name: str | None, tracking_uri: str, tags: dict[str, str], save_dir: str
    ) -> None:
        _require("mlflow")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        if tracking_uri.startswith("sqlite:///"):
            Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self._id_file = Path(save_dir) / MLFLOW_ID
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name or Run(Path(save_dir)).name,
            # a client opens its database immediately, at the same time as those of other ranks, which never log
            tracking_uri=tracking_uri if is_first_rank() else "http://localhost",
            tags=dict(tags),
            run_id=read_regular(self._id_file).strip() if self._id_file.exists() else None,
        )

    @classmethod
    def preflight(cls, *_: Any, **__: Any) -> None:
        """Checks before the run directory is created that MLflow is installed."""
        _require("mlflow")

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Logs the configuration of a new run, and stores MLflow's ID in the run directory."""
        if not self._id_file.exists():
            super().log_hyperparams(params)
            write_file(self._id_file, f"{self.run_id}\n")


class TrackioLogger(Logger):
    """Lightning logger for Trackio, which has none. Trackio's database is local, unless its own settings name a server.

    Args:
        project: Name of the project.
        run_name: Name of the run. None: that of the run directory.
        group: Group of the run, or None.
        save_dir: Run directory.

    Raises:
        UserError: Trackio is not installed.
    """

    def __init__(self, project: str, run_name: str | None, group: str | None, save_dir: str) -> None:
        super().__init__()
        _require("trackio")
        self.project, self.group, self.run_name = project, group, run_name or Run(Path(save_dir)).name
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @classmethod
    def preflight(cls, *_: Any, **__: Any) -> None:
        """Checks before the run directory is created that Trackio is installed."""
        _require("trackio")

    @property
    def name(self) -> str:
        """Name of the project."""
        return self.project

    @property
    def version(self) -> str:
        """Name of the run."""
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run; started when it is first used."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                project=self.project,
                name=self.run_name,
                group=self.group,
                config=self._config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Keeps the configuration for the start of the run."""
        self._config = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs a row of metrics."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Waits until all rows are stored."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"logger={package} needs the {package} package: {install_extra(package)}")
