"""Components: config nodes with ``_target_``, from which users' own classes and functions are built.

A component is plain data until it is built. ``gptlab.config.trust`` has the rules for components that are read from a
run directory. Imports no torch.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    PydanticUndefinedAnnotation,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from gptlab.config.kinds import join_kinds
from gptlab.errors import UserError, did_you_mean, install_extra

TARGET = "_target_"
EXTRAS = {"aim": "aim", "pytorch_optimizer": "optimizers"}  # extras of packages whose classes are used directly
NEEDS_TARGET = "a component needs _target_"  # message of a validation error
DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
INSTANTIATE_KEYS = (TARGET, "_partial_", "_args_", "_recursive_", "_convert_")  # of hydra.utils.instantiate


def is_component(value: object) -> bool:
    """Whether a config value is a component: a node with ``_target_``."""
    return isinstance(value, Mapping) and isinstance(value.get(TARGET), str)


def _check(value: object) -> object:
    if value is not None and not is_component(value):
        # an unknown key is reported as such (see gptlab.config.base)
        raise PydanticCustomError("extra_forbidden", NEEDS_TARGET)
    return value


def _check_choice(value: object) -> object:
    if not is_component(value):
        raise PydanticCustomError("literal_component", "Input should be a component")
    return value


Component = Annotated[dict[str, Any] | None, BeforeValidator(_check)]  # None disables a component
# a component as an alternative to the names of built-in parts
ComponentChoice = Annotated[dict[str, Any], BeforeValidator(_check_choice), WithJsonSchema({"type": "component"})]


def enabled_components(extra: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Returns the components among the additional keys of a config group, without those that are null."""
    return {name: values for name, values in (extra or {}).items() if values is not None}


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


def import_target(key: str, target: str) -> Any:
    """Imports the target of a component.

    Args:
        key: Dotted key of the component, for the message.
        target: Dotted path of a class or function.

    Raises:
        UserError: The target cannot be imported.
    """
    if not DOTTED_PATH.fullmatch(target):
        raise UserError(f"{key}.{TARGET}={target} is not a dotted path, such as mylab.callbacks.GradientHistogram.")
    try:
        return _locate(target)
    except AttributeError as error:
        nearest = did_you_mean(str(error.name), dir(error.obj)) if error.obj is not None else ""
        if target.startswith("__main__."):
            nearest = " Move it from the notebook or script to a module, which a resumed run can import, too."
        raise UserError(f"{key}.{TARGET}={target} cannot be imported: {error}.{nearest}") from error
    except Exception as error:  # whatever a user's module raises when it is imported
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing in EXTRAS:
            raise UserError(
                f"{key}.{TARGET}={target} needs the package {missing}: {install_extra(EXTRAS[missing])}"
            ) from error
        searched = f" {_search_path()}" if missing else ""
        raise UserError(
            f"{key}.{TARGET}={target} cannot be imported: {type(error).__name__}: {error}.{searched}"
        ) from error


def _search_path() -> str:
    path = os.environ.get("PYTHONPATH")
    return (
        f"Modules are searched in the working directory ({Path.cwd()}), PYTHONPATH{f'={path}' if path else ''} and the "
        "installed packages."
    )


def _locate(target: str) -> Any:
    """Imports a dotted path as hydra.utils.instantiate does, for which attributes take precedence over modules."""
    parts = target.split(".")
    found: Any = import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            path = ".".join(parts[:number])
            if not isinstance(found, ModuleType):
                raise
            try:
                found = import_module(path)
            except ModuleNotFoundError as error:
                if error.name != path:  # a module that it imports
                    raise
                raise AttributeError(f"module {found.__name__} has no attribute {part}", name=part, obj=found) from None
    return found


def check_component(
    key: str, values: Mapping[str, Any], interface: type | None = None, handed: Iterable[str] = ()
) -> Any:
    """Checks the target and the arguments of a component, and of the components among its arguments.

    Arguments are checked against the signature of the target: their names and, where the annotation is plain data, a
    dataclass or a pydantic model, their types.

    Args:
        key: Dotted key of the component.
        values: The component.
        interface: Class of which the target must be a subclass; None if any callable will do.
        handed: Names of the arguments that gptlab passes.

    Returns:
        The target.

    Raises:
        UserError: The target cannot be imported or is no such class, or an argument is unknown, missing or invalid.
    """
    target = import_target(key, values[TARGET])
    if interface is None and not callable(target):
        raise UserError(f"{key}.{TARGET}={values[TARGET]} is neither a class nor a function.")
    if interface is not None and not (isinstance(target, type) and issubclass(target, interface)):
        raise UserError(
            f"{key}.{TARGET}={values[TARGET]} is not a subclass of {interface.__module__}.{interface.__qualname__}."
        )
    if "_args_" in values:
        raise UserError(f"{key}._args_ is not supported. Set the arguments by their names.")
    _check_node(key, target, values, handed, is_partial=False)
    return target


def _check_node(
    key: str, target: Callable[..., Any], values: Mapping[str, Any], handed: Iterable[str], *, is_partial: bool
) -> None:
    """Checks the arguments of a component, and the components among them."""
    arguments = component_arguments(values)
    check_arguments(key, target, arguments, handed, is_partial=is_partial)
    for name, value in arguments.items():
        for number, element in enumerate(value) if isinstance(value, list) else ((None, value),):
            if is_component(element):
                inner = f"{key}.{name}" if number is None else f"{key}.{name}.{number}"
                nested = import_target(inner, element[TARGET])
                if not callable(nested):
                    raise UserError(f"{inner}.{TARGET}={element[TARGET]} is neither a class nor a function.")
                is_open = bool(element.get("_partial_")) or "_args_" in element
                _check_node(inner, nested, element, (), is_partial=is_open)


def check_arguments(
    key: str, target: Callable[..., Any], arguments: Mapping[str, Any], handed: Iterable[str] = (), *, is_partial: bool
) -> None:
    """Checks that a callable accepts the given arguments and, unless it is partial, that no required one is missing.

    Args:
        key: Dotted key of the arguments.
        target: The callable.
        arguments: Arguments by name.
        handed: Names of the arguments that gptlab passes.
        is_partial: Whether further arguments may follow later.

    Raises:
        UserError: An argument is unknown, missing or invalid.
    """
    if (named := _parameters(target)) is None:
        return
    title = getattr(target, "__qualname__", str(target))
    takes_any = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())
    for name, value in arguments.items():
        if name in handed:
            raise UserError(f"{key}.{name} cannot be set: gptlab passes this argument to {title}.")
        if name in named:
            _check_type(f"{key}.{name}", named[name].annotation, value)
        elif not takes_any:
            nearest = did_you_mean(name, sorted(set(named) - set(handed)))
            raise UserError(f"Unknown argument {key}.{name}: {title} has no such argument.{nearest}")
    missing = [
        name for name, p in named.items() if p.default is p.empty and name not in arguments and name not in handed
    ]
    if missing and not is_partial:
        raise UserError(f"{key}.{missing[0]} is missing: it is a required argument of {title}.")


def build_component(values: Mapping[str, Any], **handed: Any) -> Any:
    """Builds a component with ``hydra.utils.instantiate``.

    An argument that is handed in is passed only if the target has a parameter of this name, and its own value, if it is
    set, takes precedence. Arguments that are annotated with a dataclass or a pydantic model are converted to it. Hydra
    gets the target only, because it would resolve interpolations in the strings of a stored configuration.

    Args:
        values: The component.
        handed: Arguments from gptlab.

    Raises:
        UserError: A package that the target needs is not installed.
    """
    from hydra.utils import instantiate

    named = _parameters(_locate(values[TARGET])) or {}
    handed = {name: value for name, value in handed.items() if name in named and name not in values}
    build = instantiate({TARGET: values[TARGET], "_partial_": True})
    try:
        return build(*_build_arguments(values.get("_args_", ())), **handed, **_build_named(values, named))
    except ModuleNotFoundError as error:
        raise UserError(f"{values[TARGET]} needs the package {error.name}: pip install {error.name}") from error


def bind_component(values: Mapping[str, Any]) -> Callable[..., Any]:
    """Returns the target of a component with its arguments bound, for functions that are called in every step."""
    target = _locate(values[TARGET])
    return functools.partial(target, **_build_named(values, _parameters(target) or {}))


def _build_named(values: Mapping[str, Any], named: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Builds the arguments of a component, whose target has the given parameters."""
    arguments = component_arguments(values)
    if values.get("_recursive_") is False:
        return arguments
    return {
        name: TypeAdapter(named[name].annotation).validate_python(value)
        if name in named and _has_record(named[name].annotation) and not any(iter_targets(value))
        else _build_arguments(value)
        for name, value in arguments.items()
    }


def _build_arguments(values: Any) -> Any:
    """Builds the components in nested plain data; with ``_partial_``, they are bound instead."""
    if is_component(values):
        return bind_component(values) if values.get("_partial_") else build_component(values)
    if isinstance(values, Mapping):
        return {key: _build_arguments(value) for key, value in values.items()}
    return [_build_arguments(value) for value in values] if isinstance(values, list | tuple) else values


def component_record(key: str, target: str) -> dict[str, Any]:
    """Returns the code version of a component: its package, the version of the package, and a hash of its source file.

    Args:
        key: Dotted key of the component, for messages.
        target: Dotted path of the class or function.
    """
    found = import_target(key, target)
    package = (getattr(found, "__module__", None) or target).partition(".")[0]
    names = metadata.packages_distributions().get(package, ())
    return {
        "target": target,
        "package": package,
        "version": metadata.version(names[0]) if names else None,
        "sha256": _hash_source(found),
    }


def component_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a component, without ``_target_`` and the other keys of ``hydra.utils.instantiate``."""
    return {name: value for name, value in values.items() if name not in INSTANTIATE_KEYS}


def hash_sources(values: Mapping[str, Any]) -> str:
    """Returns a hash of the files that define the targets of a component and of the components among its arguments."""
    hashes = (_hash_source(import_target(key, target)) or "" for key, target in iter_targets(values))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _hash_source(target: Any) -> str | None:
    """Returns the hash of the file that defines a class or function; None for built-in ones."""
    module = sys.modules.get(getattr(target, "__module__", None) or "")
    return _hash_file(getattr(module, "__file__", None))


@functools.cache  # a process keeps the code that it has imported, even if the file changes later
def _hash_file(path: str | None) -> str | None:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else None


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Returns the named parameters of a callable; None if it has no signature, like some built-in classes."""
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except Exception:  # an annotation that cannot be evaluated raises anything
        try:
            parameters = inspect.signature(target).parameters
        except ValueError:
            return None
    return {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _check_type(key: str, annotation: Any, value: Any) -> None:
    """Checks an argument against its annotation, if that is plain data, a dataclass or a pydantic model."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str) or is_component(value):
        return
    if dataclasses.is_dataclass(annotation) and isinstance(value, Mapping):  # pydantic ignores unknown fields of these
        known = [field.name for field in dataclasses.fields(annotation)]
        if unknown := [name for name in value if name not in known]:
            raise UserError(f"Unknown argument {key}.{unknown[0]}.{did_you_mean(unknown[0], known)}")
    try:
        adapter = TypeAdapter(annotation)
        schema = adapter.json_schema()
    except (PydanticUserError, PydanticUndefinedAnnotation):  # another class, which pydantic does not know
        return
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        details = error.errors()[0]
        if _is_record(annotation) and details["loc"]:
            key, expected = f"{key}.{details['loc'][0]}", details["msg"].replace("Input should be ", "it should be ")
            raise UserError(f"{key} is not valid: {expected}.") from None
        raise UserError(f"{key}={value!r} is not valid: it should be {join_kinds(schema)}.") from None


def _is_record(annotation: Any) -> bool:
    """Whether an annotation is a dataclass or a pydantic model."""
    return isinstance(annotation, type) and (dataclasses.is_dataclass(annotation) or issubclass(annotation, BaseModel))


def _has_record(annotation: Any) -> bool:
    """Whether an annotation is a dataclass or a pydantic model, or has one inside: ``Options | None``."""
    return _is_record(annotation) or any(map(_has_record, get_args(annotation)))
