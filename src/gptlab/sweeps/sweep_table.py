"""Live table of the trials of a sweep. Imports no torch."""

import logging
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.text import Text

from gptlab.tables import FittingTable
from gptlab.terminal import get_console
from gptlab.tracking.run_store.state import load_state
from gptlab.tracking.run_store.sweeps import Trial, format_overrides

log = logging.getLogger(__name__)

MAX_ROWS = 20  # running trials first, then the latest that ended
COLORS = {"done": "green", "running": "cyan", "pruned": "yellow", "waiting": "dim"}


class SweepTable:
    """Live table of the trials in a terminal. Also logs a line when a trial starts or ends.

    Args:
        trials: Function that returns all trials.
        run_dir: Function that returns the run directory of a trial.
    """

    def __init__(self, trials: Callable[[], list[Trial]], run_dir: Callable[[Trial], Path]) -> None:
        self.trials, self.run_dir = trials, run_dir
        self._live = Live(get_renderable=self._table, console=get_console(), refresh_per_second=2, transient=True)

    def __enter__(self) -> "SweepTable":
        if get_console().is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def began(self, trial: Trial) -> None:
        """Logs that a trial has started."""
        again = f" (attempt {trial.starts})" if trial.starts > 1 else ""
        log.info("%s", f"trial {trial.number} started{again}: {format_overrides(trial.overrides)}")

    def ended(self, trial: Trial) -> None:
        """Logs the result of a trial."""
        value = "" if trial.value is None else f" · {trial.value:.4f}"
        is_told = trial.blew_up or trial.state not in ("done", "pruned")
        reason = f": {trial.message}" if trial.message and is_told else ""
        state = f"{trial.state}{', blew up' if trial.blew_up else ''}"
        log.info("%s", f"trial {trial.number} {state}{value} · {format_overrides(trial.overrides)}{reason}")

    def _table(self) -> Group:
        table = FittingTable()
        table.add_column("trial", "right")
        table.add_column("state")
        table.add_column("step", "right", drop_order=3)
        table.add_column("loss", "right", drop_order=1)
        table.add_column("val loss", "right", drop_order=4)
        table.add_column("time left", "right", drop_order=2)
        table.add_column("overrides", wraps=True)
        trials = self.trials()
        active = [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in trials if trial.state not in ("running", "waiting")]
        room = MAX_ROWS - len(active)
        shown = [*others[-room:], *active] if room > 0 else active[:MAX_ROWS]
        for trial in sorted(shown, key=lambda trial: trial.number):
            table.add_row(*self._row(trial))
        counts = Counter(trial.state for trial in trials)
        return Group(table, Text("  " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))))

    def _row(self, trial: Trial) -> list[str | Text]:
        state = load_state(self.run_dir(trial))
        name = Text(trial.state, style=COLORS.get(trial.state, "red"))
        overrides = Text(format_overrides(trial.overrides))
        if state is None:
            return [str(trial.number), name, "", "", "", "", overrides]
        left = state.seconds_left if trial.state == "running" else None
        return [
            *(str(trial.number), name, f"{state.step:,}/{state.max_steps:,}", _loss(state.loss)),
            _loss(trial.value if trial.value is not None else state.best_val_loss),
            *("" if left is None else str(timedelta(seconds=round(left))), overrides),
        ]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
