"""Formats values in the grammar of Hydra's overrides. Imports no torch."""

import contextlib
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def format_value(value: Any) -> str:
    """Formats a value as in ``key=<value>`` on the command line: None as null, [1, "a,b"] as [1,'a,b'].

    Raises:
        TypeError: The value, or a part of it, is not None, a boolean, a number, a string, a list or a mapping.
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case numbers.Integral():
            return str(int(value))
        case numbers.Real():
            return repr(float(value))
        case str() | Path():
            return _quote_if_needed(str(value))
        case Mapping():
            return f"{{{','.join(f'{format_value(name)}:{format_value(item)}' for name, item in value.items())}}}"
        case list() | tuple():
            return f"[{','.join(format_value(item) for item in value)}]"
    raise TypeError(f"{value!r:.200} is not None, a boolean, a number, a string, a list or a mapping")


def _quote_if_needed(text: str) -> str:
    """Quotes a string that Hydra's grammar would not parse as this string, such as "1e-3" or "a,b"."""
    with contextlib.suppress(HydraException):
        for context in (f"key={text}", f"key=[{text}]"):
            value = OverridesParser.create().parse_override(context).value()
            if value not in (text, [text]):
                break
        else:
            return text
    return QuotedString(text, Quote.single).with_quotes()
