"""The process of a run over several devices: python -m gptlab.experiments.worker <file>. Started by ``launching``."""

import json
import sys
from pathlib import Path

from gptlab.errors import UserError
from gptlab.experiments.exits import INTERRUPTED, tell
from gptlab.experiments.job import run
from gptlab.experiments.launching import make_ready
from gptlab.experiments.logs import log_to_screen
from gptlab.experiments.schema import Config, check


def main() -> None:
    """Run what the file says; Lightning starts this module again, with the same file, for every other rank."""
    log_to_screen()
    content = json.loads(Path(sys.argv[1]).read_text())
    try:
        config, prepared = make_ready(check(Config, content["config"]))
        run(config, prepared, content["place"] and Path(content["place"]))
    except UserError as error:
        sys.exit(tell(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
