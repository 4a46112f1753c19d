"""A run of a proof: python -m gptlab.experiments.proving.run <file>. Started by ``runs``. Imports no torch."""

import sys
from pathlib import Path

from gptlab.experiments.handover import end_with, read_job
from gptlab.experiments.launching import launch
from gptlab.experiments.logs import log_to_screen


def main() -> None:
    """Run what the file says, as a job of a sweep is run."""
    log_to_screen()
    end_with(lambda: launch(*read_job(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
