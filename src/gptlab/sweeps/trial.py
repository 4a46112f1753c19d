"""The process of one trial: python -m gptlab.sweeps.trial <file>. Started by ``pool``."""

import sys
from pathlib import Path

from gptlab.launch.job_file import end_with, read_job
from gptlab.launch.launcher import launch
from gptlab.launch.signals import let_in
from gptlab.launch.supervisor import end_with_supervisor
from gptlab.tracking.logs import log_to_console


def main() -> None:
    """Run what the file says."""
    end_with_supervisor()
    end_with(_work)


def _work() -> int:
    let_in()
    return run_file(Path(sys.argv[1]))


def run_file(path: Path) -> int:
    """Run the configuration in a file, in the run directory that it names; return the exit status."""
    log_to_console()
    config, run_dir = read_job(path)
    return launch(config, run_dir)


if __name__ == "__main__":
    main()
