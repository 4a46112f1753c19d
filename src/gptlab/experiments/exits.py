"""How commands end: their exit statuses, and the sentence for a mistake."""

import sys

from gptlab.training.processes import is_first_rank

DONE = 0
MISTAKEN = 2  # the command or its input
INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def tell(error: Exception) -> int:
    """Print what is wrong, once and not once a process; return the exit status."""
    if is_first_rank():
        print(f"gptlab: {error}", file=sys.stderr)
    return MISTAKEN
