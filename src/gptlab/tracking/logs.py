"""Logging of a command: to the console and to train.log in the run directory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gptlab import progress
from gptlab.files import open_append
from gptlab.terminal import get_console, printable
from gptlab.training.distributed.processes import is_first_rank

FILE_ONLY = {"file_only": True}  # `extra` of messages that are not logged to the console
NOISY = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


class ConsoleHandler(logging.Handler):
    """Handler that prints messages above the progress bar, except those that the bar shows."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(make_printable)

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message."""
        console = get_console()
        if getattr(record, "file_only", False) or (getattr(record, "progress", False) and console.is_terminal):
            return
        console.print(self.format(record), markup=False, emoji=False, highlight=False, soft_wrap=True)


class _FileHandler(logging.StreamHandler[TextIO]):
    """Handler that drops messages if the disk is full; logging would print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing."""

    def close(self) -> None:
        """Closes the file."""
        super().close()
        with suppress(OSError):  # text that could not be written
            self.stream.close()


def make_printable(record: logging.LogRecord) -> bool:
    """Filter of handlers: escapes control characters in a message and hides passwords, since a terminal may show it."""
    record.msg, record.args = printable(record.getMessage()), None
    if record.exc_info:
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
    return True


def log_to_console() -> None:
    """Logs gptlab's messages to the console, on the first rank only and unless ``hydra/job_logging`` does so."""
    logger = logging.getLogger("gptlab")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, ConsoleHandler)]
    configured = logging.getLogger().handlers
    for handler in configured:
        handler.addFilter(make_printable)
    if is_first_rank() and not any(type(handler) is logging.StreamHandler for handler in configured):
        logger.addHandler(ConsoleHandler())
    if is_first_rank() and get_console().is_terminal:
        progress.show_bar = _show_reading_bar


@contextmanager
def _show_reading_bar(what: str, total: int) -> Iterator[progress.Advance]:
    """Shows a bar for ``gptlab.progress.track_reading``, also within another bar."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(
        TextColumn("{task.description}", markup=False), *columns, console=get_console(), transient=True
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)


def log_to_file(path: Path) -> logging.StreamHandler[TextIO]:
    """Adds a handler that logs gptlab's messages and Python's warnings to a file, until ``close_log``."""
    handler = _FileHandler(open_append(path))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(make_printable)
    for name in ("gptlab", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    return handler


def close_log(handler: logging.Handler) -> None:
    """Stops logging to the file of ``log_to_file``."""
    for name in ("gptlab", "py.warnings"):
        logging.getLogger(name).removeHandler(handler)
    handler.close()


def quiet_lightning() -> None:
    """Silences Lightning's messages below warnings, whose advice does not apply to gptlab."""
    logging.captureWarnings(True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # For every norm and checkpoint, the first logger warns that a two-dimensional mesh is reduced one dimension at a
    # time; the second warns that Gloo has no all-to-all. They are named after private modules (checked in torch 2.13).
    for name in ("_redistribute", "_collective_utils"):
        logging.getLogger(f"torch.distributed.tensor.{name}").setLevel(logging.ERROR)
