"""Incremental decoding of token IDs to text."""

import codecs
from collections.abc import Sequence

from gptlab.data.tokenizers.tokenizer import Tokenizer


class TextStream:
    """Decodes token IDs incrementally. Returns only complete characters, and holds back a possible stop string.

    Args:
        tokenizer: Tokenizer of the token IDs.
        stops: Non-empty strings. The text ends before the first occurrence of any of them.

    Attributes:
        ended: Whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops, self.ended = tokenizer, stops, False
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        """Adds token IDs and returns the text that has become final."""
        return self._final_text(self._characters.decode(self.tokenizer.to_bytes(ids)), last=False)

    def close(self) -> str:
        """Returns the rest of the text, with incomplete characters replaced by U+FFFD."""
        return self._final_text(self._characters.decode(b"", final=True), last=True)

    def _final_text(self, more: str, *, last: bool) -> str:
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
    """Returns the length of the longest proper prefix of ``stop`` that is a suffix of ``text``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
