"""Adds evaluations of a finished run to its W&B record."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gptlab.config.locations import check_locations
from gptlab.errors import UserError
from gptlab.files import read_regular
from gptlab.tracking.run_directory import load_config
from gptlab.tracking.run_store.state import load_state
from gptlab.tracking.wandb.files import SYNCED_SUFFIX, wandb_records
from gptlab.tracking.wandb.init import ID, client_settings, start_client
from gptlab.tracking.wandb.opt_outs import opt_out

log = logging.getLogger(__name__)


def send_evaluation(directory: Path, what: str, metrics: Mapping[str, float]) -> None:
    """Adds "evaluations/<what>/<metric>" to the summary of a run's W&B record, if it has one online.

    A run in progress is skipped, since only its own process may write its record. A failure of W&B is logged as a
    warning: the results are in the run directory.

    Args:
        directory: Run directory.
        what: Name of the evaluation, which is also the name of its results file.
        metrics: Results by name.
    """
    config = load_config(directory)
    settings = config.logger.wandb
    if settings is None or settings.mode == "offline" or not _is_online(directory):
        return
    if (state := load_state(directory)) is not None and state.state == "running":
        log.warning("The evaluation is not sent to W&B, since the run is in progress and is writing its W&B record.")
        return
    try:
        check_locations(config, directory, used=("logger.wandb",))
    except UserError as error:
        log.warning("The evaluation is not sent to W&B: %s", error)
        return
    summary = {f"evaluations/{what}/{name}": value for name, value in metrics.items()}
    try:
        if forbidden := opt_out():
            log.info("The evaluation is not sent to W&B because of %s.", forbidden.source)
            return
        import wandb  # after the opt-out check, so that an opt-out imports no client

        # in a temporary directory: wandb/ in the run directory is the record of training
        with tempfile.TemporaryDirectory(prefix="gptlab-", ignore_cleanup_errors=True) as folder:
            start_client()
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                id=read_regular(directory / ID),
                resume="must",
                dir=folder,
                settings=client_settings(settings),
            )
            run.summary.update(summary)
            run.finish()
    except Exception as error:  # any error: the results are kept in the run directory
        log.warning("The evaluation is not sent to W&B: %s", " ".join(str(error).split()))


def _is_online(directory: Path) -> bool:
    """Whether W&B's server has a record of at least one start of the run."""
    records = wandb_records(directory)
    return any(
        not path.parent.name.startswith("offline") or path.with_suffix(SYNCED_SUFFIX).exists() for path in records
    )
