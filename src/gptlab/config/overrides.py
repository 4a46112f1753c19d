"""Command lines: their arguments, rewritten to flags and overrides that Hydra's parser accepts. Imports no torch."""

import argparse
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gptlab.config.base import similar_keys
from gptlab.errors import UserError

_PARSER = OverridesParser.create()


class CommandLine(NamedTuple):
    """Parsed arguments of a command.

    Attributes:
        flags: Hydra's flags, parsed.
        flag_arguments: Arguments of these flags, as given.
        overrides: Overrides that Hydra's parser accepts.
    """

    flags: argparse.Namespace
    flag_arguments: list[str]
    overrides: list[str]

    @property
    def arguments(self) -> list[str]:
        """Arguments from which Hydra's parser returns the same flags and overrides."""
        return [*self.flag_arguments, *self.overrides]


def parse_command_line(
    arguments: Sequence[str], keys: Collection[str], literal_keys: Collection[str] = (), subject: str | None = None
) -> CommandLine:
    """Parses the arguments of a command.

    In addition to what Hydra accepts, overrides may stand before and after flags, ``--key=value`` is an override, as
    W&B's agent writes it, and paths without a key are the value of ``subject``. Values that Hydra's grammar does not
    accept, such as a path with "=", are quoted.

    Args:
        arguments: Arguments of the command.
        keys: Dotted names of its config keys.
        literal_keys: Keys whose values are taken literally, not parsed by Hydra's grammar.
        subject: Key of its main input, a plural if it takes several; None if it has none.

    Raises:
        UserError: A flag is unknown or has an invalid value, or an argument is neither an override nor a path.
    """
    # Hydra's parser is not public (checked in hydra-core 1.3.8). A separate parser would have to duplicate all of
    # Hydra's flags and their abbreviations.
    parser = get_args_parser()
    parser.error = _raise_error  # type: ignore[method-assign]
    flags, unknown = parser.parse_known_intermixed_args(list(arguments))
    not_flags = [*unknown, *flags.overrides]  # after an unknown flag, argparse returns overrides as unknown
    overrides, paths, flag_arguments = [], [], []
    for argument in arguments:
        if argument not in not_flags:
            flag_arguments.append(argument)
            continue
        not_flags.remove(argument)
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("-") and not (argument.startswith("--") and equals):
            meant = _suggest(key.lstrip("-"), keys, value)
            raise UserError(f"Unknown flag {argument}. Config keys are set without dashes, as <key>=<value>.{meant}")
        if equals and key.strip() and key != key.rstrip():
            raise UserError(f"{argument!r} has a space before '='. Write {key.rstrip()}={value}")
        if key.strip("+~ ") and (equals or key.startswith("~")):
            overrides.append(quote_override(argument.removeprefix("--"), literal_keys, is_sweep=flags.multirun))
        elif subject is not None and not equals and key:
            paths.append(argument)
        else:
            meant = _suggest(key, keys, value)
            if not equals and "data.source" in keys and Path(argument).exists():
                meant = f" To use the file: data=text data.source={argument}"
            raise UserError(f"{argument!r} is not an override, which has the form <key>=<value>.{meant}")
    if len(paths) > 1 and not str(subject).endswith("s"):
        raise UserError(f"{' '.join(paths)}: the command takes one {subject}, not {len(paths)}.")
    if paths:
        quoted = ",".join(map(_quote, paths))
        overrides.append(f"{subject}={quoted if len(paths) == 1 else f'[{quoted}]'}")
    return CommandLine(flags, flag_arguments, overrides)


def quote_override(argument: str, literal_keys: Collection[str] = (), *, is_sweep: bool = False) -> str:
    """Quotes the value of an override if it is literal or not valid in Hydra's grammar (a path with "=", code).

    Args:
        argument: The override.
        literal_keys: Keys whose values are literal.
        is_sweep: Whether commas separate values, each of which is quoted on its own.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if key in literal_keys:
        not_interpolated = value.replace("${", r"\${")
        return f"{key}={_quote(not_interpolated)}"
    if value.startswith(("'", '"')) or _is_valid(argument):
        return argument
    if is_sweep and len(parts := list(_split(value))) > 1:
        return f"{key}={','.join(part if _is_valid(f'{key}={part}') else _quote(part) for part in parts)}"
    return f"{key}={_quote(value)}"


def _is_valid(override: str) -> bool:
    try:
        _PARSER.parse_override(override)
    except HydraException:
        return False
    return True


def _split(value: str) -> Iterator[str]:
    """Yields the parts of a value between commas outside of brackets and quotes."""
    for found in re.finditer(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\[[^]]*\]|\([^)]*\)|\{[^}]*\}|[^,])+""", value):
        yield found[0].strip()


def _quote(value: str) -> str:
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", value)  # backslashes are special only in front of a quote
    trailing = re.search(r"\\*$", escaped)
    return f"'{escaped}{trailing[0] if trailing else ''}'"


def _suggest(key: str, keys: Collection[str], value: str) -> str:
    """Returns " Did you mean <override>?" for the argument ``key``, or "" if no config key is similar."""
    found = [key] if key in keys else similar_keys(key, keys)
    meant = " or ".join(f"{name}={value or '<value>'}" for name in found)
    return f" Did you mean {meant}?" if meant else ""


def _raise_error(message: str) -> NoReturn:
    raise UserError(f"{message[:1].upper()}{message[1:]}.")
