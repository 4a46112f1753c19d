"""Packages whose components may be built from the configuration of a run directory. Imports no torch.

What a user types, and what is in their configuration directories, is trusted. What is read from a run directory, a
sweep, a manifest or a job file is trusted only if its package is.
"""

import os
import re
import sys
from collections.abc import Iterable
from importlib import metadata

from gptlab.config.components import DOTTED_PATH, TARGET, import_target, iter_targets
from gptlab.errors import UserError

TRUST_KEY = "trust"  # key of the commands, not of a run's configuration: names of trusted packages
TRUST = "GPTLAB_TRUST"  # environment variable with the names of trusted packages, separated by commas
ENTRY_POINTS = "gptlab.components"  # group of entry points by which an installed package declares its components
# packages whose classes are trusted where gptlab checks their interface; the last two are those of conf/
OWN_PACKAGES = ("gptlab", "lightning", "torch.optim", "torch.nn", "pytorch_optimizer", "aim.pytorch_lightning")
# keys of the components whose interface gptlab checks
CHECKED_KEYS = re.compile(
    r"(callbacks|logger)\.[^.]+|model(\.(block|attention|activation|norm))?|loss|optimizer|schedule|data\.reader|tokenizer"
)
# packages with functions that run what they are given: of these, single components are trusted, not the package
LIBRARIES = {"gptlab", "lightning", "torch", *sys.stdlib_module_names}
OWN_FUNCTIONS = "gptlab.model.losses"  # module whose functions are trusted, too


def trust_packages(names: Iterable[str]) -> None:
    """Trusts packages in this process and in those that it starts, through the environment variable GPTLAB_TRUST."""
    trusted = [name for name in os.environ.get(TRUST, "").split(",") if name]
    if added := [name for name in dict.fromkeys(names) if name not in trusted]:
        os.environ[TRUST] = ",".join((*trusted, *added))


def trust_components(values: object) -> None:
    """Trusts the packages of all components of a user's own configuration; of ``LIBRARIES``, only these components."""
    trust_packages(_trusted_name(target) for _, target in iter_targets(values))


def _trusted_name(target: str) -> str:
    """Returns what is trusted with a component: its package, or the component itself."""
    package = target.partition(".")[0]
    return target if package in LIBRARIES else package


def trusted_packages() -> set[str]:
    """Returns the packages of which any component may be built: those of GPTLAB_TRUST and those that declare it.

    GPTLAB_TRUST may also have dotted names of modules and of single components.
    """
    from_environment = (name.strip() for name in os.environ.get(TRUST, "").split(","))
    return {*filter(None, from_environment), *_declared_packages()}


def trust_override(values: object) -> str:
    """Returns the override, after a space, that trusts the components of a stored configuration; "" if all are."""
    if not (targets := list(iter_targets(values))):
        return ""  # reading the entry points of all packages takes time
    declared = _declared_packages()
    others = (target for key, target in targets if not _is_inside(target, _trusted_at(key, declared)))
    names = sorted({_trusted_name(target) for target in others})
    return f" {TRUST_KEY}=[{','.join(names)}]" if names else ""


def _trusted_at(key: str, named: set[str]) -> set[str]:
    """Returns the packages that are trusted at a key of a stored configuration, if those of ``named`` are."""
    own = OWN_PACKAGES[:1] if key.startswith("logger.") else OWN_PACKAGES
    return {*named, *own} if CHECKED_KEYS.fullmatch(key) else named


def _declared_packages() -> set[str]:
    points = metadata.entry_points(group=ENTRY_POINTS)
    return {point.value.partition(":")[0].partition(".")[0] for point in points}


def _is_inside(name: str, packages: set[str]) -> bool:
    """Whether a dotted name is one of the packages or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def check_trusted(values: object, origin: object) -> None:
    """Checks that every component of a stored configuration is of a trusted package.

    A target is of the package that it names and of the one that defines it: ``mylab.os.system`` is of ``mylab`` and of
    ``os``. Classes of ``OWN_PACKAGES`` are trusted, because gptlab checks their interface; as arguments of other
    components, where it does not, they are not. Nor are loggers of other packages than gptlab, which write to any
    directory and send credentials to any server that their arguments name.

    Args:
        values: Nested plain data.
        origin: File or directory that the configuration is from, for the message.

    Raises:
        UserError: A target is of another package.
    """
    targets = list(iter_targets(values))
    named = trusted_packages() if targets else set()
    for key, target in targets:
        if not DOTTED_PATH.fullmatch(target):
            raise UserError(f"{key}.{TARGET}={target} in {origin} is not a dotted path.")
        if target in named:
            continue
        trusted = _trusted_at(key, named)
        _require_trusted(key, target, target, trusted, origin)
        found = import_target(key, target)
        defined_in = getattr(found, "__module__", None) or "builtins"
        is_checked = isinstance(found, type) or defined_in == OWN_FUNCTIONS
        _require_trusted(key, target, defined_in, trusted if is_checked else named, origin)


def _require_trusted(key: str, target: str, name: str, trusted: set[str], origin: object) -> None:
    """Raises UserError unless ``name`` is one of the trusted packages or inside one."""
    if not _is_inside(name, trusted):
        package = name.partition(".")[0]
        named = target if package in LIBRARIES else package
        raise UserError(
            f"{key}.{TARGET}={target} in {origin} would run code of the package {package}, which is not trusted. "
            f"If you trust it: {TRUST_KEY}=[{named}] or {TRUST}={named}"
        )
