"""Base class of all configuration classes, and validation with actionable error messages.

Default values are defined only in ``conf/``. Configuration classes define the type and the range of each field.
"""

from collections.abc import Collection, Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails, PydanticKnownError

from gptlab.config.components import NEEDS_TARGET, TARGET
from gptlab.config.kinds import join_kinds
from gptlab.errors import UserError


class FrozenConfig(BaseModel):
    """Base of the configuration classes: immutable, and unknown keys or invalid values raise an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuses true and false for a number, which pydantic would convert to 1 and 0."""
        if isinstance(value, bool) and info.field_name is not None:
            types = set(_plain_types(cls.model_fields[info.field_name].annotation))
            if types & {int, float} and not types & {bool, Any}:
                raise PydanticKnownError("int_type" if int in types else "float_type")
        return value


class Location:
    """Annotation of the fields of a configuration that have a path, a URL or the name of an account on a server."""


class ComponentConfig(FrozenConfig):
    """Configuration of a component (``gptlab.config.components``): further keys are ``_target_`` and arguments."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]

    @property
    def name(self) -> str:
        """The target."""
        return str((self.model_extra or {})[TARGET])

    @property
    def component(self) -> dict[str, Any]:
        """The component: target and arguments."""
        return {**(self.model_extra or {}), TARGET: self.name}  # as a string, whatever was given


def component_or_built_in(values: Any) -> Literal["component", "built_in"]:
    """Returns the discriminator of a union of a ``ComponentConfig`` and another configuration."""
    is_component = TARGET in values if isinstance(values, Mapping) else isinstance(values, ComponentConfig)
    return "component" if is_component else "built_in"


def component_or_name(values: Any) -> str | None:
    """Returns the discriminator of a union of a ``ComponentConfig`` and configurations with a literal ``name``."""
    if component_or_built_in(values) == "component":
        return "component"
    name: str | None = values.get("name") if isinstance(values, Mapping) else getattr(values, "name", None)
    return name


# prefixes of pydantic's error types for a value of another type or out of range
WRONG_VALUE = (
    *("int_", "float_", "bool_", "string_type", "string_pattern", "literal_"),
    *("less_", "greater_", "none_", "list_", "tuple_"),
)

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


def validate(config_type: type[ConfigT], values: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Validates a resolved configuration.

    Args:
        config_type: Class to build.
        values: Nested plain data, keyed by field name.
        prefix: Beginning of the names of its keys on the command line: "hydra.launcher.".

    Returns:
        The validated configuration.

    Raises:
        UserError: A value is invalid, missing or unknown; the message has one line for each.
    """
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        keys = set(known_keys(config_type, prefix))
        problems: dict[tuple[str, object], ErrorDetails] = {}
        for details in error.errors():
            # a wrong value has an error for each member of a union, which are reported as one
            problem = WRONG_VALUE if _is_wrong_value(details) else object()
            problems[dotted_key(details, values), problem] = details
        messages = (_error_message(config_type, details, values, keys, prefix) for details in problems.values())
        raise UserError("\n".join(messages)) from None


def rebuild(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Rebuilds a validated configuration from its ``model_dump(mode="json")``, without validating it again."""
    fields = config_type.model_fields
    rebuilt = {key: _rebuild_value(fields[key].annotation if key in fields else None, values[key]) for key in values}
    return config_type.model_construct(**rebuilt)  # type: ignore[return-value]  # typed as the base class by the plugin


def known_keys(config_type: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all config keys, including groups."""
    for name, field in config_type.model_fields.items():
        yield prefix + name
        for part in _config_types(field.annotation):
            yield from known_keys(part, f"{prefix}{name}.")


def unknown_key(key: str, keys: set[str]) -> str:
    """Returns the error message for an unknown key; it suggests the most similar one of ``keys``."""
    if key in keys and "." not in key:
        return f"Config group `{key}` is not replaced by a mapping. To set its keys: +{key}=<mapping>"
    if key.endswith("._target_"):
        return (
            f"Config key `{key}` is not in this configuration. If {key.removesuffix('._target_')} may be a "
            f"component, add it: +{key}=<class or function>"
        )
    section, _, name = key.rpartition(".")
    if key in keys and section.startswith("hydra.") and section.count(".") > 1:
        return f"Config key `{key}` is set with the others of its mapping: '{section}={{{name}: <value>, ...}}'"
    if key in keys:
        group = "hydra/launcher" if section == "hydra.launcher" else key.partition(".")[0]
        return f"Config key `{key}` belongs to other options of {group}=, not to the selected one."
    meant = f" Did you mean {' or '.join(found)}?" if (found := similar_keys(key, keys)) else ""
    return f"Unknown config key `{key}`.{meant} --cfg job prints all keys."


# names that users know from nanoGPT, Lightning or submitit
SYNONYMS = {
    "accumulate_grad_batches": "train.micro_batch_size",
    "array_parallelism": "hydra.launcher.at_once",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "dtype": "trainer.precision",
    "epochs": "train.max_steps",
    "eval_interval": "train.eval_every",
    "eval_iters": "train.eval_windows",
    "gres": "hydra.launcher.additional_parameters",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clip_val": "train.grad_clip",
    "learning_rate": "optimizer.lr",
    "log_every_n_steps": "train.log_every",
    "log_interval": "train.log_every",
    "max_epochs": "train.max_steps",
    "max_iters": "train.max_steps",
    "n_jobs": "hydra.launcher.at_once",
    "out_dir": "hydra.run.dir",
    "time": "hydra.launcher.timeout_min",
    "val_check_interval": "train.eval_every",
    "wandb_project": "logger.wandb.project",
    "warmup_iters": "schedule.warmup_steps",
}


SIMILAR = 0.65  # least ratio of difflib between names of which one may be a misspelling of the other


def similar_keys(word: str, keys: Collection[str]) -> list[str]:
    """Returns up to two config keys that ``word`` may stand for, the most similar one first; [] if there is none.

    Preferred are keys with the same last part (``optimizer.lr`` for ``lr`` or ``train.lr``) or whose last part ends
    with it (``train.global_batch_size`` for ``batch_size``), then the key with the most similar spelling.
    """
    last = word.rpartition(".")[2]
    if (meant := SYNONYMS.get(last)) in (*keys, "hydra.run.dir") and meant is not None:
        return [meant]
    last_parts = {key: key.rpartition(".")[2] for key in sorted(keys)}
    if found := [key for key, part in last_parts.items() if last and f"_{part}".endswith(f"_{last}")]:
        found.sort(
            key=lambda key: (
                "." in word and not f".{key}".endswith(f".{word}"),
                key.count("."),
                last_parts[key] != last,
                -SequenceMatcher(a=key, b=word).ratio(),
            )
        )
        return found[:1] if last_parts[found[0]] == last else found[:2]
    if nearest := get_close_matches(word, last_parts, n=1, cutoff=SIMILAR):
        return nearest
    similar = get_close_matches(last, set(last_parts.values()), n=1, cutoff=SIMILAR)
    return [key for key, part in last_parts.items() if part in similar][:2]


def get_value(values: Any, key: str, default: Any = None) -> Any:
    """Returns the value of a dotted name in nested dicts and lists, or ``default`` if there is none."""
    for part in key.split("."):
        try:
            values = values[int(part) if isinstance(values, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            return default
    return values


def copy_key(path: list[str], source: dict[str, Any], target: dict[str, Any]) -> None:
    """Copies a value, or its whole group if the source or the target does not have that group."""
    for part in path[:-1]:
        if not isinstance(target.get(part), dict) or not isinstance(source.get(part), dict):
            target[part] = source.get(part)
            return
        source, target = source[part], target[part]
    if path[-1] in source:
        target[path[-1]] = source[path[-1]]
    else:
        target.pop(path[-1], None)


def _rebuild_value(annotation: Any, value: Any) -> Any:
    """Converts a JSON value to the type of its annotation: a configuration class, a tuple or plain data."""
    if isinstance(value, Mapping):
        candidates = [config_type for config_type in _config_types(annotation) if _accepts_name(config_type, value)]
        return rebuild(candidates[0], value) if candidates else dict(value)
    if isinstance(value, list):
        if get_origin(annotation) is tuple:
            return tuple(value)
        (item,) = get_args(annotation) if get_origin(annotation) is list else (None,)
        return [_rebuild_value(item, element) for element in value]
    return value


def _accepts_name(config_type: type[FrozenConfig], values: Mapping[str, Any]) -> bool:
    """Whether ``values`` belong to this member of a union, by its literal ``name``, or by having ``_target_``."""
    if TARGET in values and config_type.model_config["extra"] != "allow":
        return False
    field = config_type.model_fields.get("name")
    if field is None or get_origin(field.annotation) is not Literal:
        return True
    return values.get("name") in get_args(field.annotation)


def _plain_types(annotation: Any) -> Iterator[Any]:
    """Yields the members of a union, without annotations; the items of lists are not members."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]:
            yield from _plain_types(part)
    else:
        yield annotation


def _config_types(annotation: Any) -> Iterator[type[FrozenConfig]]:
    """Yields the configuration classes in an annotation, including the members of unions."""
    if isinstance(annotation, type) and issubclass(annotation, FrozenConfig):
        yield annotation
    for part in get_args(annotation):
        yield from _config_types(part)


def _error_message(
    config_type: type[FrozenConfig], details: ErrorDetails, values: Mapping[str, Any], keys: set[str], prefix: str
) -> str:
    """Returns the message for one of pydantic's errors."""
    inner = dotted_key(details, values)
    key = prefix + inner if inner else ""
    match details["type"]:
        case "extra_forbidden" if details["msg"] == NEEDS_TARGET:
            return f"{unknown_key(key, keys)} A component of this name needs {key}._target_."
        case "extra_forbidden" if key.endswith("._target_"):
            return f"{key} is not supported: {key.removesuffix('._target_')} cannot be a component."
        case "extra_forbidden":
            return unknown_key(key, keys)
        case "missing":
            return f"{key} is missing. Set it on the command line: {key}=<value>"
        case "value_error":
            problem = str(details["ctx"]["error"]).removeprefix(f"{key}.")
            is_about_key = key and f"{key}.{problem.partition('=')[0]}" in keys
            return f"{key}.{problem}." if is_about_key else f"{key}: {problem}." if key else f"{problem}."
        case "union_tag_not_found":
            return f"{key}.name is missing. Select an option: {key}=<option>"
        case "union_tag_invalid":
            return f"{key}.name={details['ctx']['tag']} is unknown. Valid names: {details['ctx']['expected_tags']}."
    value, schema = get_value(values, inner), _schema(config_type, inner, values)
    if schema is None or not _is_wrong_value(details):
        expected = details["msg"].replace("Input should be ", "it should be ")
        return f"{key}={details['input']!r} is not valid: {expected}."
    allowed = join_kinds(schema)
    is_number = details["type"] == "string_type" and isinstance(value, int | float) and not isinstance(value, bool)
    quoted = f""" To pass the number as a string: '{key}="{value}"'""" if is_number else ""
    return f"{key}={value!r} is not valid: it should be {allowed}.{quoted}"


def _is_wrong_value(details: ErrorDetails) -> bool:
    """Whether the error says that a value has another type than its field or is out of range."""
    return details["type"].startswith(WRONG_VALUE)


def _schema(config_type: type[FrozenConfig], key: str, values: Any) -> dict[str, Any] | None:
    """Returns the JSON schema of the field ``key``; None if it is not a plain value."""
    candidates, field, parts = [config_type], None, key.split(".")
    while parts and candidates and (found := [c for c in candidates if parts[0] in c.model_fields]):
        fitting = [c for c in found if _accepts_name(c, values)] or found
        field, values = fitting[0].model_fields[parts[0]], values.get(parts.pop(0))
        candidates = list(_config_types(field.annotation))
    if field is None or candidates:
        return None
    annotation: Any = Annotated[field.annotation, field]
    schema = TypeAdapter(annotation).json_schema()
    for part in parts:  # items of lists
        lists = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") == "array"]
        items = lists[0].get("prefixItems") if lists else None
        schema = items[int(part) % len(items)] if items else lists[0].get("items", {}) if lists else {}
    return schema or None


def dotted_key(details: ErrorDetails, values: Any) -> str:
    """Returns the dotted key of an error, without the names of union members that pydantic inserts."""
    location, is_missing = details["loc"], details["type"] == "missing"
    parts: list[str] = []
    for number, part in enumerate(location, start=1):
        inside = values.get(part) if isinstance(values, Mapping) else None
        named = isinstance(values, Mapping) and (part in values or (is_missing and number == len(location)))
        if isinstance(part, str) and not named:
            continue
        if isinstance(part, int) and not isinstance(values, list):
            continue
        parts.append(str(part))
        values = get_value(values, str(part)) if isinstance(part, int) else inside  # None for a missing item
    return ".".join(parts)
