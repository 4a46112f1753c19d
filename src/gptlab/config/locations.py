"""Paths and URLs in the configuration of a run directory, which may be somebody else's. Imports no torch.

A configuration can name any file to read, any directory to write and any server to contact. What a user types is used
without a question, and so are the paths of their own runs. Those of other run directories are used only if the user
agrees.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from gptlab.config.base import Location, get_value
from gptlab.config.components import TARGET
from gptlab.errors import UserError
from gptlab.terminal import print_message

TRUST_PATHS_KEY = "trust_paths"  # key of the commands, not of a run's configuration
TRUST_PATHS = "GPTLAB_TRUST_PATHS"  # environment variable with the same meaning, if it is 1
# names of arguments of components that have paths or URLs of any form, and of those that have names of metrics
_NAMED_LOCATION = re.compile("dir|path|file|folder|root|repo|source|uri|url|host|server|endpoint|_args_", re.IGNORECASE)
_NAMED_METRIC = re.compile("monitor|metric|prefix", re.IGNORECASE)
OUTPUTS = "GPTLAB_OUTPUTS"  # environment variable with the directory of all runs; outputs by default
_accepted: set[tuple[str, str]] = set()  # keys and values that the user has agreed to in this process


def trust_paths(agreed: object) -> None:
    """Trusts all paths in this process and in those that it starts, if ``agreed``; see ``check_locations``."""
    if agreed not in (True, False, None):
        raise UserError(f"{TRUST_PATHS_KEY}={agreed} is not valid: it should be true or false.")
    if agreed:
        os.environ[TRUST_PATHS] = "1"


def outputs_folder() -> Path:
    """Returns the directory in which runs and sweeps are created."""
    return Path(os.environ.get(OUTPUTS) or "outputs").expanduser()


def check_locations(
    config: BaseModel,
    run_dir: Path,
    *,
    used: tuple[str, ...] | None = None,
    given: Mapping[str, object] | None = None,
) -> None:
    """Checks that the paths and URLs in the configuration of a run directory may be used; asks on a terminal.

    These may be used: paths inside of the run directory, values that the user has given, the default of data.cache_dir,
    and everything in a user's own run, which is in ``outputs_folder`` and owned by the user.

    Args:
        config: Configuration of the run.
        run_dir: Run directory.
        used: Keys and groups that the command uses; None for all.
        given: Configuration of the command, as nested plain data.

    Raises:
        UserError: The user has not agreed; the message lists the paths and URLs.
    """
    foreign = [
        (key, value)
        for key, value in find_locations(config)
        if (used is None or f"{key}.".startswith(tuple(f"{name}." for name in used)))
        and not _is_inside(value, run_dir)
        and not _is_same(value, get_value(given or {}, key))
        and not (key == "data.cache_dir" and _is_same(value, os.environ.get("GPTLAB_CACHE", "~/.cache/gptlab")))
    ]
    if set(foreign) <= _accepted or os.environ.get(TRUST_PATHS) == "1" or _is_own(run_dir):
        return
    pairs = (f"{key}={value}" for key, value in foreign)
    listed = [pair if pair.isprintable() else repr(pair)[1:-1] for pair in pairs]
    if not _asks(run_dir, listed):
        raise UserError(
            f"{run_dir} is not a run of yours in {outputs_folder().absolute()}, and its configuration has paths or "
            f"URLs outside of it: {', '.join(listed)}. If you trust them, add {TRUST_PATHS_KEY}=true or set "
            f"{TRUST_PATHS}=1."
        )
    _accepted.update(foreign)


def find_locations(config: BaseModel) -> Iterator[tuple[str, str]]:
    """Yields the dotted keys and values of all paths and URLs in a configuration.

    They are in the fields annotated with ``Location`` and in all component arguments that could be a path or URL,
    since their types are unknown.
    """
    yield from _find(config, "")


def _find(value: object, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        for name, part in value:
            key = f"{prefix}{name}"
            if name not in fields:
                yield from _find_arguments(part, key)
            elif not isinstance(part, str):
                yield from _find(part, f"{key}.")
            elif Location in fields[name].metadata:
                yield key, part
    elif isinstance(value, Mapping):
        yield from _find_arguments(value, prefix.removesuffix("."))


def _find_arguments(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Yields the paths and URLs among the arguments of a component."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _find_arguments(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _find_arguments(part, f"{key}.{number}")
    elif isinstance(value, str) and not key.endswith(f".{TARGET}") and _may_be_location(key, value):
        yield key, value


def _may_be_location(key: str, value: str) -> bool:
    name = next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
    if _NAMED_LOCATION.search(name) or value.startswith(("/", "~", ".")) or "://" in value:
        return True
    return any(character in value for character in "/\\:") and not _NAMED_METRIC.search(name)


def _is_inside(value: str, run_dir: Path) -> bool:
    """Whether a path is inside of a run directory, also after links are resolved."""
    try:
        return "://" not in value and Path(value).expanduser().resolve().is_relative_to(run_dir.resolve())
    except (OSError, RuntimeError, ValueError):  # a null character, a loop of links or an unknown user
        return False


def _is_same(value: str, given: object) -> bool:
    """Whether the user has given the same path or URL."""
    if not isinstance(given, str) or value == given:
        return value == given
    return "://" not in given and os.path.abspath(os.path.expanduser(given)) == value  # noqa: PTH100, PTH111


def _is_own(run_dir: Path) -> bool:
    """Whether a run directory is in the directory of runs and was written by this user."""
    try:
        owners = {path.lstat().st_uid for path in (run_dir.resolve(), run_dir / "config.yaml")}
        return owners == {os.geteuid()} and run_dir.resolve().is_relative_to(outputs_folder().resolve())
    except OSError:
        return False


def _asks(run_dir: Path, listed: list[str]) -> bool:
    """Asks on a terminal whether paths and URLs may be used; returns False if there is no terminal."""
    is_terminal = sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()
    if not is_terminal or int(os.environ.get("WORLD_SIZE", 1)) > 1:  # each rank would ask
        return False
    lines = "\n".join(f"  {pair}" for pair in listed)
    print_message(f"The configuration of {run_dir} has paths or URLs outside of it:\n{lines}", file=sys.stderr)
    print_message("Use them? [y/N]", file=sys.stderr)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
