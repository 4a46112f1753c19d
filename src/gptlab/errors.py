"""Errors that end a command with a message instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Error in the command line, the configuration or the input.

    The message says what is wrong, why, and what would be right. Commands print it and exit with code 2.
    """


class Diverged(Exception):  # noqa: N818
    """Training has diverged: the gradient was not finite for too many steps in a row.

    The message names the first of these steps. Commands print it and exit with code 3.
    """


def first_line(error: Exception) -> str:
    """Returns the first line of another library's error message, or the error's class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def failure_reason(error: Exception) -> str:
    """Returns why a file operation failed, without the error number and the path: "no such file or directory"."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean <nearest>?" for the known word closest to ``word``, or "" if none is close."""
    nearest = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]}?" if nearest else ""
