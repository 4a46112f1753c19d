"""A run of a proof: python -m gptlab.verification.process <file>. Started by ``runs``. Imports no torch."""

import sys
from pathlib import Path

from gptlab.launch.job_file import end_with, read_job
from gptlab.launch.launcher import launch
from gptlab.tracking.logs import log_to_console


def main() -> None:
    """Run what the file says, as a job of a sweep is run."""
    log_to_console()
    end_with(lambda: launch(*read_job(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
