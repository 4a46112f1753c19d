"""Griffe extension: a placeholder such as <owner> in a docstring is text, not an HTML tag."""

import re
from typing import Any

import griffe

PLACEHOLDER = re.compile(r"(`+)(?:.|\n)+?\1|<(?=\w)")


class Placeholders(griffe.Extension):
    """Escapes "<" before a word, outside of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = PLACEHOLDER.sub(lambda found: found[0] if found[1] else "&lt;", obj.docstring.value)
