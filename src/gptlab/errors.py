"""Errors that end a command with a message instead of a traceback."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic_core import ValidationError

_SCHEME = r"\b[a-zA-Z][a-zA-Z0-9+.-]{1,20}:/"  # one slash: Path collapses the two of a URL
_URL = re.compile(rf"{_SCHEME}\S*")
# up to the last @ in front of the path; or user:password@ with a slash in the password, but not host:port/path@
_USER_INFO = re.compile(rf"({_SCHEME}/?)(?:[^\s/?#]*|[^\s/?#@:]{{0,200}}:(?!\d+[/?#])[^\s@]{{0,200}})@")


class UserError(Exception):
    """Error in the command line, the configuration or the input.

    The message says what is wrong, why, and what would be right. Commands print it and exit with code 2. Passwords in
    URLs are hidden in it.
    """

    def __str__(self) -> str:
        return hide_passwords(super().__str__())


class Diverged(Exception):  # noqa: N818
    """Training has diverged: the gradient was not finite for too many steps in a row, or the last val loss is not.

    Commands print the message and exit with code 3.
    """


class OutOfMemory(Exception):  # noqa: N818
    """The memory of the GPU of this process, or of the machine, does not suffice.

    Commands print the message and exit with code 1.
    """


class TrainingError(Exception):
    """A run that ``gptlab.train`` started in Python has not reached its end.

    Attributes:
        exit_code: Exit code of the command with the same overrides: 2 for an invalid configuration or input, 3 if
            training diverged, 75 if a signal stopped the run, otherwise 1 or that of a killed process.
        run_dir: Run directory; None if the run ended before it had one.
    """

    def __init__(self, message: str, exit_code: int, run_dir: Path | None = None) -> None:
        super().__init__(message, exit_code, run_dir)
        self.exit_code, self.run_dir = exit_code, run_dir

    def __str__(self) -> str:
        return hide_passwords(str(self.args[0]))


def hide_passwords(text: str) -> str:
    """Hides user names, passwords, and the queries of URLs, which can contain tokens and signatures.

    ``https://user:password@host/path?token=1`` becomes ``https://***@host/path?***``.
    """
    return _URL.sub(lambda found: _hide_query(_USER_INFO.sub(r"\1***@", found[0])), text)


def without_passwords(values: Any) -> Any:
    """Returns a copy of plain data with the passwords in its strings hidden by ``hide_passwords``."""
    if isinstance(values, dict):
        return {key: without_passwords(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_passwords(value) for value in values]
    return hide_passwords(values) if isinstance(values, str) else values


def _hide_query(url: str) -> str:
    whole = url.rstrip("'\")]}>.,:;!?")  # without what follows the URL in a sentence
    query = re.search(r"[?#].*", whole)
    if query is None or not ("?" in query[0] or "=" in query[0]):  # a fragment with a value may be a token
        return url
    return f"{whole[: query.start()]}?***{url[len(whole) :]}"


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error message, or the error's class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def failure_reason(error: Exception) -> str:
    """Returns why a file cannot be read or written, without its path, as "no such file or directory".

    Of pydantic's ValidationError, it returns the first problem as "'key': what is wrong".
    """
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        return f"{key!r:.200}: {reason}" if key else reason
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def mismatch_reason(error: Exception) -> str:
    """Returns why values from a file do not fit, from an error that was raised when they were used."""
    if isinstance(error, KeyError) and error.args:
        return f"it lacks the entry {error.args[0]!r:.200}"
    return f"{type(error).__name__}: {' '.join(str(error).split()):.500}"


def install_extra(name: str) -> str:
    """Returns how to install an extra, for messages. gptlab is not on a package index."""
    return f"pip install '.[{name}]' in a checkout of gptlab"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean <nearest>?" for the known word closest to ``word``, or "" if none is close."""
    nearest = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]}?" if nearest else ""
