"""Streaming decoding: token ids to text, incrementally."""

import codecs
from collections.abc import Sequence

from gptlab.data.tokenizers.tokenizer import Tokenizer


class TextStream:
    """Decodes ids incrementally; returns complete characters only, and nothing that may begin a stop string.

    Args:
        tokenizer: Of the ids.
        stops: Strings, none of them empty, at the first of which the text ends; they are not part of it.

    Attributes:
        ended: Whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops, self.ended = tokenizer, stops, False
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids; returns the text that is final by now."""
        return self._sure(self._characters.decode(self.tokenizer.to_bytes(ids)), last=False)

    def close(self) -> str:
        """Returns the rest; incomplete characters become U+FFFD."""
        return self._sure(self._characters.decode(b"", final=True), last=True)

    def _sure(self, more: str, *, last: bool) -> str:
        if self.ended:
            return ""
        text = self._held + more
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_partial_stop_length(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _partial_stop_length(text: str, stop: str) -> int:
    """Length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
