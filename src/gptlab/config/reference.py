"""Config keys with the comments that explain them, read from the files of conf/. Imports no torch.

Used by --help and by the configuration reference of the documentation.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from gptlab.config.override_values import format_value
from gptlab.terminal import printable
from gptlab.tracking.run_store.runs import flatten

GLOBAL = "# @package _global_"


class ConfigKey(NamedTuple):
    """Config key of one file.

    Attributes:
        name: Dotted name, as on the command line.
        default: Value as written in the file.
        comment: Trailing comment with its continuation lines or, if there is none, the comment above the key.
        heading: Comment above a key that also has a trailing comment; it applies to the keys that follow.
    """

    name: str
    default: str
    comment: str
    heading: str


class ConfigFile(NamedTuple):
    """One file of conf/.

    Attributes:
        name: Path below conf/ without the suffix: ``train``, ``model/gpt2``.
        summary: Comment at the top of the file.
        defaults: Entries of its defaults list, as ``group: option``.
        keys: Keys in the order of the file.
        is_global: Whether its keys are relative to the root of the configuration, not to its group.
    """

    name: str
    summary: str
    defaults: list[str]
    keys: list[ConfigKey]
    is_global: bool

    @property
    def group(self) -> str:
        """Config group; "" for the primary configuration of a command."""
        return self.name.rpartition("/")[0]

    @property
    def option(self) -> str:
        """Name of the option in its group, or of the command."""
        return self.name.rpartition("/")[2]


def read_config_file(path: Path, conf: Path) -> ConfigFile:
    """Reads the keys of a configuration file, with their defaults and comments."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    name = path.relative_to(conf).with_suffix("").as_posix()
    is_global = GLOBAL in lines[:2] or "/" not in name
    prefix = "" if is_global else name.rpartition("/")[0].replace("/", ".") + "."
    top = [line for line in lines[: _first_content(lines)] if line.strip() and line != GLOBAL]
    summary = " ".join(line.lstrip("# ").rstrip() for line in top)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = list(_keys(root, prefix, lines, _first_content(lines))) if isinstance(root, yaml.MappingNode) else []
    return ConfigFile(name, summary, _defaults(text), keys, is_global)


def read_configuration(conf: Path) -> list[ConfigFile]:
    """Reads every file of conf/ except Hydra's help texts and the W&B sweep files, which are generated."""
    return [read_config_file(path, conf) for path in _paths(conf)]


def comments(files: list[ConfigFile]) -> dict[str, str]:
    """Returns the comment of each key, from the files that define keys; experiments only override values."""
    found: dict[str, str] = {}
    for file in sorted(files, key=lambda file: -len(file.keys)):  # base options such as data/text first
        for key in () if file.is_global and file.group else file.keys:
            if key.comment:
                found.setdefault(key.name, key.comment)
    return found


def meaning(key: ConfigKey, known: Mapping[str, str]) -> str:
    """Returns the comment of a key: its own, or that of the key that it overrides, varies or relocates."""
    mounted = ".".join(key.name.split(".")[-2:])  # train.gpt2.model.n_layer in conf/bench.yaml -> model.n_layer
    varied = re.match(r"hydra\.sweeper\.(params|baseline)\.", key.name)
    names = (key.name, varied[0][:-1]) if varied else (key.name, mounted)
    return key.comment or next((known[name] for name in names if name in known), "")


def explain_values(config: DictConfig, folders: Sequence[Path]) -> str:
    """Returns each key of a composed configuration as ``key=value``, followed by its comment, wrapped at 80 columns.

    Args:
        config: Configuration composed by Hydra, with the selected options in ``hydra.runtime.choices``.
        folders: Directories with configuration files in search order; gptlab's own is the last.
    """
    files = [file for folder in reversed(folders) for file in _read_valid(folder)]
    known = comments(files)
    choices = {**config.hydra.runtime.choices, "": config.hydra.job.config_name}
    for file in files:  # another option, or command, may explain a key differently
        if file.option in _selected(choices.get(file.group)):
            known |= {key.name: key.comment for key in file.keys if key.comment}
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)  # noqa: S101
    values = {str(name): value for name, value in container.items() if name != "hydra"}
    known |= {group: f"config group, option {option}" for group, option in choices.items() if values.get(group) == {}}
    return printable("".join(_explain(*leaf, known) for leaf in flatten(values)))


def _selected(choice: Any) -> list[Any]:
    return list(choice) if isinstance(choice, ListConfig) else [choice]


def _explain(name: str, value: Any, known: Mapping[str, str]) -> str:
    comment = meaning(ConfigKey(name, "", "", ""), known)
    explained = fill(comment, 80, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    shown = value if isinstance(value, str) and ("${" in value or value == "???") else format_value(value)
    return f"{name}={shown}\n{explained}\n" if comment else f"{name}={shown}\n"


def _read_valid(conf: Path) -> list[ConfigFile]:
    """Reads a directory of the user, which may have files that are not valid, or gptlab's own."""
    found = []
    for path in _paths(conf):
        try:
            found.append(read_config_file(path, conf))
        except (OSError, ValueError, yaml.YAMLError):
            continue
    return found


def _paths(conf: Path) -> list[Path]:
    """Returns the files of a configuration directory except Hydra's help texts and the generated W&B sweep files."""
    paths = [*sorted(conf.glob("*.yaml")), *sorted(conf.glob("*/**/*.yaml"))]
    folders = ("hydra/help/", "sweeps/wandb/")
    return [path for path in paths if not path.relative_to(conf).as_posix().startswith(folders)]


def _first_content(lines: list[str]) -> int:
    return next((number for number, line in enumerate(lines) if line.strip() and line[0] != "#"), len(lines))


def _defaults(text: str) -> list[str]:
    values = yaml.safe_load(text)
    entries = values.get("defaults") or [] if isinstance(values, dict) else []
    pairs = [next(iter(entry.items())) if isinstance(entry, dict) else ("", entry) for entry in entries]
    return [f"{key}: {'null' if value is None else value}" if key else str(value) for key, value in pairs]


def _keys(node: yaml.MappingNode, prefix: str, lines: list[str], start: int) -> Iterator[ConfigKey]:
    """Yields the keys below a mapping.

    Args:
        node: A mapping; keys of a flow mapping have no comments of their own.
        prefix: Dotted name of the mapping, with a trailing dot.
        lines: Lines of the file.
        start: First line that can belong to the comment above the first key.
    """
    for key, value in node.value:
        first, name = key.start_mark.line, f"{prefix}{key.value}"
        above = _comment_above(lines, first, start, key.start_mark.column)  # none within a flow mapping
        is_mapping = isinstance(value, yaml.MappingNode) and bool(value.value)
        last, column = (first, key.end_mark.column + 1) if is_mapping and not value.flow_style else _end(value)
        behind, start = ("", start) if node.flow_style else _comment_behind(lines, last, column)
        if is_mapping:
            yield from _nested(value, name, " ".join(filter(None, (above, behind))), lines, start)
            start = max(start, _end(value)[0] + 1)
        elif key.value != "defaults":
            yield ConfigKey(name, _default(value, lines), behind or above, above if behind else "")


def _nested(value: yaml.MappingNode, name: str, comment: str, lines: list[str], start: int) -> Iterator[ConfigKey]:
    """Yields the keys of a nested mapping; its own comment becomes the heading of the first."""
    for number, key in enumerate(_keys(value, f"{name}.", lines, start)):
        heading = " ".join(filter(None, (comment, key.heading))) if number == 0 else key.heading
        yield key._replace(heading=heading)


def _end(value: yaml.Node) -> tuple[int, int]:
    """Returns the line and column at which a value ends."""
    if isinstance(value, yaml.CollectionNode) and not value.flow_style:
        item = value.value[-1]
        return _end(item[1] if isinstance(item, tuple) else item)
    return value.end_mark.line, value.end_mark.column


def _default(value: yaml.Node, lines: list[str]) -> str:
    """Returns a value as written in the file, on one line."""
    if isinstance(value, yaml.SequenceNode) and not value.flow_style:
        return f"[{', '.join(_default(item, lines) for item in value.value)}]"
    start, end = value.start_mark, value.end_mark
    if isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"):
        return repr(value.value)
    if start.line == end.line:
        return lines[start.line][start.column : end.column]
    parts = [lines[start.line][start.column :], *lines[start.line + 1 : end.line], lines[end.line][: end.column]]
    return " ".join(part.strip() for part in parts)


def _comment_behind(lines: list[str], line: int, column: int) -> tuple[str, int]:
    """Returns the trailing comment of a value and the line after it; lines that start in its column continue it."""
    rest = lines[line][column:] if line < len(lines) else ""
    if not rest.lstrip().startswith("#"):
        return "", line + 1
    begin = column + rest.index("#")
    found = [lines[line][begin:]]
    for following in lines[line + 1 :]:
        if following[:begin].strip() or not following[begin:].startswith("#"):
            break
        found.append(following[begin:])
    return _join(found), line + len(found)


def _comment_above(lines: list[str], line: int, start: int, column: int) -> str:
    """Returns the comment lines directly above a key, in its column."""
    found: list[str] = []
    for above in reversed(lines[start:line]):
        if not above[column:].startswith("#") or above[:column].strip():
            break
        found.insert(0, above[column:])
    return _join(found)


def _join(comment: list[str]) -> str:
    return " ".join(line.lstrip("#").strip() for line in comment).strip()
