"""Evaluations of a finished run, added to its W&B record."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gptlab.tracking.run_directory import load_config
from gptlab.tracking.run_store.state import load_state
from gptlab.tracking.wandb.files import SYNCED_SUFFIX, wandb_records
from gptlab.tracking.wandb.init import ID, start_client, timeout_settings
from gptlab.tracking.wandb.opt_outs import opt_out

log = logging.getLogger(__name__)


def send_evaluation(directory: Path, what: str, metrics: Mapping[str, float]) -> None:
    """Adds "evaluations/<what>/<metric>" to the summary of a run's W&B record, if it has one online.

    The record of a run that is under way is its own process' alone, and gets nothing. W&B being away stops nothing: the
    results are in the run directory.

    Args:
        directory: The run's.
        what: Of the results' file.
        metrics: What was found, by name.
    """
    settings = load_config(directory).logger.wandb
    if settings is None or settings.mode == "offline" or not _is_online(directory):
        return
    if (state := load_state(directory)) is not None and state.state == "running":
        log.warning("The evaluation is not sent to W&B: the run is in progress and writes its own record there.")
        return
    summary = {f"evaluations/{what}/{name}": value for name, value in metrics.items()}
    try:
        if forbidden := opt_out():
            log.info("The evaluation is not sent to W&B, because of %s.", forbidden.source)
            return
        import wandb  # only now: an opt-out loads no client

        # in a folder of its own: what lies in the run's is the record of the training
        with tempfile.TemporaryDirectory(prefix="gptlab-", ignore_cleanup_errors=True) as folder:
            start_client()
            run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                id=(directory / ID).read_text(),
                resume="must",
                dir=folder,
                settings=timeout_settings(settings),
            )
            run.summary.update(summary)
            run.finish()
    except Exception as error:  # whatever it is, the results are kept
        log.warning("The evaluation is not sent to W&B: %s", " ".join(str(error).split()))


def _is_online(directory: Path) -> bool:
    """Whether W&B has a record of the run, or had a part of it at least."""
    records = wandb_records(directory)
    return any(
        not path.parent.name.startswith("offline") or path.with_suffix(SYNCED_SUFFIX).exists() for path in records
    )
