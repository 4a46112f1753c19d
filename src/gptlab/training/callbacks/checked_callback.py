"""Base class of ready-made callbacks, whose arguments are checked before the run directory is created."""

from typing import Any

import lightning as L

from gptlab.errors import UserError


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


def check_positive(group: str, **numbers: int | None) -> None:
    """Raises UserError if a config key of ``group`` is neither a positive integer nor None."""
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"{group}.{name}={number} must be a positive integer.")
