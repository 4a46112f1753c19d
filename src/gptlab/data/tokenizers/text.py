"""Text of tokenizers: the end-of-text token, text that UTF-8 can encode, and line breaks in prompts."""

import re
from collections.abc import Callable, Sequence

END_OF_TEXT = "<|endoftext|>"
_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which cannot be encoded in UTF-8, with U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def unescape_line_breaks(text: str) -> str:
    r"""Replaces \n by a line break, and \\n by \n, in a text that a user has typed on one line."""
    return re.sub(r"\\(\\?)n", lambda found: r"\n" if found[1] else "\n", text)


def decode_parts(ids: Sequence[int], end_of_text: int | None, decode: Callable[[list[int]], str]) -> str:
    """Decodes the token IDs between end-of-text tokens, which ``decode`` does not get; returns the whole text."""
    parts: list[list[int]] = [[]]
    for i in map(int, ids):
        if i == end_of_text:
            parts.append([])
        else:
            parts[-1].append(i)
    return END_OF_TEXT.join(decode(part) if part else "" for part in parts)
