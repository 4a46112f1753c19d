"""Errors that a user can understand and mend: a sentence, not a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in what the user asked for.

    The message says what is wrong, where, and what would be right. Commands print it and exit with status 2.
    """


class Diverged(Exception):  # noqa: N818  (what a run has done)
    """A run learns nothing any more: its gradient was not finite for too many steps.

    The message says since when. Commands print it and exit with status 3.
    """


def first_line(error: Exception) -> str:
    """Return what an error of another library says, as far as it fits a sentence; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean <nearest>?" for the known word nearest to ``word``, or "" where none is near."""
    nearest = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]}?" if nearest else ""
