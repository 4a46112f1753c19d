"""The process of one device: python -m gptlab.experiments.worker <file>. Started by ``supervisor``."""

import sys
from pathlib import Path

from gptlab.experiments.handover import end_with, read_job
from gptlab.experiments.job import run
from gptlab.experiments.launching import make_ready
from gptlab.experiments.logs import log_to_screen
from gptlab.experiments.signals import let_in, stoppable
from gptlab.experiments.supervisor import end_with_supervisor


def main() -> None:
    """Run what the file says."""
    end_with_supervisor()
    log_to_screen()
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
