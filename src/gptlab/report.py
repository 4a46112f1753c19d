"""Creates an HTML report of runs and sweeps: python -m gptlab.report runs=<run, sweep or glob> [key=value ...]."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field, PositiveFloat

from gptlab.config.base import FrozenConfig, known_keys, validate
from gptlab.config.command import command
from gptlab.config.resolve import resolve_to_dict
from gptlab.errors import UserError, failure_reason
from gptlab.exit_codes import DONE
from gptlab.files import check_output, write_file
from gptlab.reporting.document import ReportDocument
from gptlab.reporting.live import LiveServer
from gptlab.reporting.page import TITLE, render_page
from gptlab.terminal import print_message


class ReportConfig(FrozenConfig):
    """Configuration of ``python -m gptlab.report``; see conf/report.yaml."""

    runs: Annotated[str | list[str], Field(min_length=1)]
    out: Annotated[str, Field(min_length=1)]
    overwrite: bool
    points: Annotated[int, Field(ge=10)]
    live: bool
    port: Annotated[int, Field(ge=0, lt=2**16)]
    poll: PositiveFloat


@command("report", keys=set(known_keys(ReportConfig)), literal_keys=("runs", "out"), subject="runs")
def main(values: DictConfig) -> int:
    """Writes the report to a file or, with live=true, serves it."""
    config = validate(ReportConfig, resolve_to_dict(values))
    path = Path(config.out).expanduser()
    if not config.live:
        _check_output(path, overwrite=config.overwrite)
    document = ReportDocument(config.runs, config.points)
    found = document.gather()
    for problem in found["problems"]:
        print_message(f"gptlab: {problem}", file=sys.stderr)
    if config.live:
        _serve(LiveServer(document.gather, config.port, config.poll))
        return DONE
    size = _write(path, render_page(found, poll=None))
    number = len(found["runs"])
    print_message(f"{path}: {number} run{'s' * (number != 1)}, {size / 1e6:.1f} MB. The file is self-contained.")
    return DONE


def _serve(server: LiveServer) -> None:
    """Serves the page until Ctrl-C."""
    print_message(f"Serving the report at {server.url} (Ctrl-C stops the server).", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.2)


def _check_output(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise UserError(f"out={path} is a directory. Set a file: out={path / 'report.html'}")
    check_output(path, "out", TITLE, overwrite=overwrite)


def _write(path: Path, text: str) -> int:
    """Writes the page atomically and returns its size in bytes."""
    content = text.encode()
    try:
        write_file(path, content)
    except OSError as error:
        raise UserError(f"out={path} cannot be written: {failure_reason(error)}.") from error
    return len(content)


if __name__ == "__main__":
    main()
