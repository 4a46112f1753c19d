"""Progress bar and console metrics."""

import logging
import time
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gptlab.terminal import get_console

log = logging.getLogger(__name__)

REFRESHES = 2  # refreshes of the bar per second; drawing it slows down training
LINES = 20  # progress lines in the log of a run and, without a terminal, on the console


class ProgressDisplay:
    """Displays the progress of one run: a bar in a terminal, and ``LINES`` log lines.

    Args:
        first_step: Steps completed before this process started; 0 unless the run is resumed.
        max_steps: Length of the run.
    """

    def __init__(self, first_step: int, max_steps: int) -> None:
        self.max_steps, self.began, self.first_step = max_steps, time.monotonic(), first_step
        self.every = max(1, max_steps // LINES)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if get_console().is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=get_console(),
                transient=True,
                refresh_per_second=REFRESHES,
            )
            self._task = self._bar.add_task("", total=max_steps, completed=first_step, loss="–", speed="–")
            self._bar.start()

    def step(self, step: int) -> None:
        """Advances the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, row: dict[str, float]) -> None:
        """Updates the bar's loss and speed from a row of metrics, and logs a line if one is due at ``step``."""
        loss, speed = f"{row['train/loss']:.4f}", f"{row['tokens_per_second']:,.0f}"
        if self._bar is not None:
            self._bar.update(self._task, loss=loss, speed=speed)
        if step % self.every == 0 or step in (1, self.max_steps):
            left = (time.monotonic() - self.began) / (step - self.first_step) * (self.max_steps - step)
            log.info(
                "step %*d/%d · loss %s · %s tokens/s, %.1f %% waiting for data · %.2f GB · %s left",
                *(len(str(self.max_steps)), step, self.max_steps, loss, speed),
                *(100 * row["data_wait"], row["peak_memory_gb"], timedelta(seconds=round(left))),
                extra={"progress": True},  # not printed in a terminal, which has the bar
            )

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
