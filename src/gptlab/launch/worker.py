"""The process of one device: python -m gptlab.launch.worker <file>. Started by ``supervisor``."""

import sys
from pathlib import Path

from gptlab.launch.job_file import end_with, read_job
from gptlab.launch.launcher import make_ready
from gptlab.launch.signals import let_in, stoppable
from gptlab.launch.supervisor import end_with_supervisor
from gptlab.launch.train_run import run
from gptlab.tracking.logs import log_to_console


def main() -> None:
    """Run what the file says."""
    end_with_supervisor()
    log_to_console()
    end_with(_listening)


def _listening() -> int:
    let_in()
    return stoppable(_work)


def _work() -> int:
    config, place = read_job(Path(sys.argv[1]))
    config, prepared = make_ready(config)
    return run(config, prepared, place)


if __name__ == "__main__":
    main()
