"""Base class of ready-made callbacks, whose arguments are checked before the run directory is created."""

from typing import Any

import lightning as L


class CheckedCallback(L.Callback):
    """Callback whose constructor raises UserError if an argument is not valid."""

    @classmethod
    def preflight(cls, config: Any, prepared: Any, **arguments: Any) -> None:
        """Checks the arguments of the constructor, before anything is written.

        Args:
            config: Configuration of the run.
            prepared: Data of the run.
            arguments: Arguments of the constructor.

        Raises:
            UserError: An argument is not valid.
        """
        cls(**arguments)
