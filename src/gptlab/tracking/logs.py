"""What is said while a command runs: on the screen, and in the run's train.log."""

import logging
from pathlib import Path

from rich import get_console

from gptlab.training.distributed.processes import is_first_rank

FILE_ONLY = {"file_only": True}  # `extra` of a message that the screen shows in another form
NOISY = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


class ConsoleHandler(logging.Handler):
    """Prints messages above the progress bar, and leaves out what the bar shows."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        console = get_console()
        if getattr(record, "file_only", False) or (getattr(record, "progress", False) and console.is_terminal):
            return
        console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def log_to_console() -> None:
    """Send what gptlab says to the screen, from the first process only."""
    logger = logging.getLogger("gptlab")
    logger.setLevel(logging.INFO)
    if is_first_rank() and not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())


def log_to_file(path: Path) -> logging.Handler:
    """Send what gptlab says, and what Lightning and Python warn of, to a file as well; ``close_log`` ends it."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("gptlab", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    return handler


def close_log(handler: logging.Handler) -> None:
    """End what ``log_to_file`` began."""
    for name in ("gptlab", "py.warnings"):
        logging.getLogger(name).removeHandler(handler)
    handler.close()


def quiet_lightning() -> None:
    """Let Lightning warn, but not chat; its advice on loaders and loggers does not fit what gptlab does."""
    logging.captureWarnings(True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # which warns, of every norm and checkpoint, that a mesh of two dimensions is reduced along one after the other;
    # a private module's logger has no other name (read in torch 2.13)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
