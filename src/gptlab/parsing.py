"""Parses YAML, JSON and pickles of plain data from somebody else, with bounded depth. Imports no torch."""

import io
import json
import pickle
import re
from collections.abc import Set
from typing import Any

import yaml

MAX_DEPTH = 50  # of nested lists and mappings; a configuration has about ten
MAX_YAML_BYTES = 2**20
MAX_DIGITS = 4300  # of a number, as in Python's int()
_NUMBER = re.compile("[-+0-9_.:a-fA-Fx]+")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if PyYAML is built with it


def parse_yaml(text: str) -> Any:
    """Parses YAML with plain data.

    libyaml's composer is recursive and crashes on deep nesting, aliases can expand to any size, and some tags raise
    unexpected errors. Therefore the events, which libyaml yields one by one, are checked first.

    Raises:
        ValueError: The text is not YAML, is nested too deeply or too long, or has an alias, an anchor or a tag.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has more than {MAX_YAML_BYTES:,} characters")
    try:
        _check_events(text)
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def parse_json(text: str) -> Any:
    """Parses JSON; raises ValueError if the text is not JSON or is nested too deeply."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    level = [values]
    for _ in range(MAX_DEPTH + 1):
        groups = [group.values() if isinstance(group, dict) else group for group in level if _is_group(group)]
        if not groups:
            return values
        level = [part for group in groups for part in group]
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def unpickle_plain(content: bytes, permitted: Set[str] = frozenset()) -> Any:
    """Unpickles dicts, lists, numbers and strings, which run no code.

    Args:
        content: The pickle.
        permitted: Full names of classes and functions that it may also refer to.

    Raises:
        UnpicklingError: It refers to another class or function.
        Exception: It is damaged; any other exception.
    """
    return _PlainUnpickler(io.BytesIO(content), permitted).load()


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles plain data. All other objects refer to a class or a function by name."""

    def __init__(self, file: io.BytesIO, permitted: Set[str]) -> None:
        super().__init__(file)
        self._permitted = permitted

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for a class or function that is not permitted."""
        if f"{module}.{name}" in self._permitted:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not plain data and could run any code")


def _is_group(value: Any) -> bool:
    return isinstance(value, dict | list)


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:  # also that of an alias
            raise ValueError(f"it has the anchor or alias {event.anchor!r:.50}")
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.tag is not None:
            raise ValueError(f"it has the tag {event.tag!r:.50}")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_DIGITS and _NUMBER.fullmatch(event.value):
            raise ValueError(f"it has a number of more than {MAX_DIGITS} digits")
