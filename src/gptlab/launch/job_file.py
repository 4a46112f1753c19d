"""How a process that runs a configuration is given it, in a file, and how it ends. Imports no torch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Never

from gptlab.config.schema import Config, check
from gptlab.errors import Diverged, UserError
from gptlab.exit_codes import INTERRUPTED, tell


def write_job(path: Path, config: Config, place: Path | None) -> None:
    """Write down a complete configuration, and the run directory where it is set apart."""
    job = {"config": config.model_dump(mode="json"), "place": place and str(place.absolute())}
    path.write_text(json.dumps(job), encoding="utf-8")


def read_job(path: Path) -> tuple[Config, Path | None]:
    """Read what ``write_job`` wrote."""
    job = json.loads(path.read_text(encoding="utf-8"))
    return check(Config, job["config"]), job["place"] and Path(job["place"])


def status_of_work(work: Callable[[], int]) -> int:
    """Return the exit status of ``work``; a user's mistake and an interrupt have theirs."""
    try:
        return work()
    except (UserError, Diverged) as error:
        return tell(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def end_with(work: Callable[[], int]) -> Never:
    """End this process with the exit status of ``work``."""
    sys.exit(status_of_work(work))
