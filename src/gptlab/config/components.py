"""Components: config nodes with ``_target_``, from which users' own classes are built. Imports no torch.

A component is plain data until ``gptlab.launch.components`` imports its target. What a user types, and what is in their
configuration directories, is trusted. What is read from a run directory is trusted only if its package is.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from gptlab.errors import UserError

TARGET = "_target_"
TRUST = "GPTLAB_TRUST"  # environment variable with the names of trusted packages, separated by commas
ENTRY_POINTS = "gptlab.components"  # group of entry points by which an installed package declares its components
OWN_PACKAGES = ("gptlab", "lightning", "torch.optim")


def is_component(value: object) -> bool:
    """Whether a config value is a component: a node with ``_target_``."""
    return isinstance(value, Mapping) and isinstance(value.get(TARGET), str)


def _check(value: object) -> object:
    if value is not None and not is_component(value):
        # an unknown key is reported as such (see gptlab.config.base)
        raise PydanticCustomError("extra_forbidden", "a component needs _target_")
    return value


Component = Annotated[dict[str, Any] | None, BeforeValidator(_check)]  # None disables a component


def iter_targets(values: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the target of every component in nested plain data, including nested components."""
    if isinstance(values, Mapping):
        if isinstance(target := values.get(TARGET), str):
            yield prefix, target
        for key, value in values.items():
            yield from iter_targets(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from iter_targets(value, f"{prefix}.{number}")


def trusted_packages(named: Iterable[str] = ()) -> set[str]:
    """Returns the packages whose components may be built from a run directory.

    Args:
        named: Packages named on the command line, by ``trust=`` or as the target of a component.
    """
    from_environment = (name.strip() for name in os.environ.get(TRUST, "").split(","))
    declared = (point.value.partition(":")[0].partition(".")[0] for point in entry_points(group=ENTRY_POINTS))
    return {*OWN_PACKAGES, *named, *filter(None, from_environment), *declared}


def check_trusted(values: object, trusted: set[str], origin: object) -> None:
    """Checks that every component of a stored configuration is of a trusted package.

    Args:
        values: Nested plain data.
        trusted: Names of packages.
        origin: Directory that the configuration is from, for the message.

    Raises:
        UserError: A target is of another package.
    """
    for key, target in iter_targets(values):
        if not any(target == name or target.startswith(f"{name}.") for name in trusted):
            package = target.partition(".")[0]
            raise UserError(
                f"{key}.{TARGET}={target} in {origin} would run code of the package {package}, which is not trusted. "
                f"If you trust it: trust=[{package}] or {TRUST}={package}"
            )
