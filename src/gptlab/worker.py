"""Entry point of every process that gptlab starts for a run: python -m gptlab.worker <job file>.

A worker is one rank of a run (started by ``launch.supervisor``) or a whole run: a trial of a sweep, a run of a proof or
a calibration run. Imports no torch before the run needs it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.exit_codes import exit_status
from gptlab.launch.components import check_components
from gptlab.launch.launcher import launch, open_data
from gptlab.launch.signals import run_stoppable, unblock_signals
from gptlab.launch.supervisor import exit_with_parent, read_job
from gptlab.terminal import install_hooks
from gptlab.tracking.logs import log_to_console
from gptlab.training.distributed.processes import collect_garbage_rarely, is_first_rank, is_worker

if TYPE_CHECKING:
    from gptlab.launch.train_run import ExtraCallback, RunContext


def main() -> None:
    """Runs the job file given on the command line and exits with its exit code."""
    exit_with_parent()
    collect_garbage_rarely()
    log_to_console()
    install_hooks()
    path = Path(sys.argv[1])
    sys.exit(exit_status(lambda: run_rank(path) if is_worker() else run_job(path)))


def run_rank(path: Path) -> int:
    """Runs one rank of a run whose configuration the supervisor has validated and completed; returns the exit code."""
    from gptlab.launch.train_run import train_run  # imports torch; signals stay blocked until then

    def train() -> int:
        job = read_job(path)
        check_components(job.config)  # whether they are trusted depends on their interfaces
        return train_run(job.config, open_data(job.config), job.plan, job.run_dir, extra_callbacks=extra_callbacks)

    unblock_signals()
    return run_stoppable(train)


def run_job(path: Path) -> int:
    """Runs a validated configuration, in this process or in workers; returns the exit code."""
    unblock_signals()
    log_to_console()
    job = read_job(path)
    return launch(job.config, job.run_dir, extra_callbacks=extra_callbacks)


def extra_callbacks(run: "RunContext") -> "list[ExtraCallback]":
    """Builds the callbacks from packages above ``launch``: forecast, memory advice and, in a sweep, pruning."""
    from gptlab.planning.forecast_callback import ForecastCallback, MemoryAdvice
    from gptlab.sweeps.sweep_store import is_prunable

    callbacks: list[ExtraCallback] = [MemoryAdvice(run), *([ForecastCallback(run)] if is_first_rank() else [])]
    if is_prunable(run.run_dir):
        from gptlab.sweeps.pruning import PruningCallback  # imports Optuna

        callbacks.append(PruningCallback(run.run_dir, run.recorder))
    return callbacks


if __name__ == "__main__":
    main()
