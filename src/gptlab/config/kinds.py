"""English descriptions of the valid values of a config key, from its JSON schema. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

TYPES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
    "component": "a component (_target_)",
}
BOUNDS = {
    "exclusiveMinimum": "greater than",
    "minimum": "greater than or equal to",
    "exclusiveMaximum": "less than",
    "maximum": "less than or equal to",
}


def join_kinds(schema: Mapping[str, Any]) -> str:
    """Returns the kinds of values that a JSON schema allows: "an integer greater than 0, or 'auto'"."""
    *kinds, last = dict.fromkeys(_kinds(schema))
    comma = "," if any(" " in kind for kind in kinds) else ""
    return f"{', '.join(kinds)}{comma} or {last}" if kinds else last


def _kinds(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yields one description per alternative."""
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        for alternative in alternatives:
            yield from _kinds(alternative)
    elif values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        yield from (repr(value) if isinstance(value, str) else str(value).lower() for value in values)
    elif schema.get("type") == "boolean":
        yield from ("true", "false")
    elif "pattern" in schema:
        yield schema["description"]
    else:
        bounds = (f"{words} {_number(schema[bound])}" for bound, words in BOUNDS.items() if bound in schema)
        yield " ".join((TYPES.get(schema.get("type", ""), "a valid value"), " and ".join(bounds))).strip()


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
