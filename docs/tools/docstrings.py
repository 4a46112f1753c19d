"""Griffe extension that renders placeholders such as <owner> in docstrings as text, not as HTML tags."""

import re
from typing import Any

import griffe

PLACEHOLDER = re.compile(r"(`+)(?:.|\n)+?\1|<(?=\w)")


class Placeholders(griffe.Extension):
    """Escapes "<" before a word, except in inline code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Escapes the docstring of a loaded object."""
        if obj.docstring is not None:
            obj.docstring.value = PLACEHOLDER.sub(lambda found: found[0] if found[1] else "&lt;", obj.docstring.value)
