"""Errors that end a command with a sentence instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error in what the user asked for.

    The message says what is wrong, where, and what would be right. Commands print it and exit with status 2.
    """


class Diverged(Exception):  # noqa: N818
    """Training has diverged: the gradient was not finite for too many steps in a row.

    The message says since which step. Commands print it and exit with status 3.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of another library's error message; the error's class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean <nearest>?" for the known word nearest to ``word``; "" if none is near."""
    nearest = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]}?" if nearest else ""
