"""Tokenizers: subclasses of ``CustomTokenizer``."""

import re
from collections.abc import Sequence

from gptlab.data.tokenizers.component import CustomTokenizer


class WordsAndBytes(CustomTokenizer):
    """UTF-8 bytes, except for given words, which are one token each.

    Args:
        words: The words.
    """

    def __init__(self, words: list[str]) -> None:
        self.pieces = [bytes([value]) for value in range(256)] + [word.encode() for word in words]
        self.end_of_text = len(self.pieces)
        self.vocab_size = len(self.pieces) + 1
        self.ids = {word: number for number, word in enumerate(words, 256)}
        self.pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b")

    def encode(self, text: str) -> list[int]:
        """Returns the token IDs of a text."""
        parts = self.pattern.split(text)  # every second part is a word
        return [i for part in parts for i in ([self.ids[part]] if part in self.ids else part.encode())]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token IDs."""
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def id_to_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token."""
        return self.pieces[token_id]
