"""Config groups of a command and their valid options, read from the files of conf/. Imports no torch.

An experiment is valid for the commands that have every key that it sets: one that sets ``run`` is for gptlab.evaluate.
"""

import functools
import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Self

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from gptlab.config.search_path import configuration_folder
from gptlab.errors import UserError, did_you_mean
from gptlab.terminal import printable

EXPERIMENT, SWEEPS = "experiment", "sweeps"
COMBINED = ("callbacks", "logger")  # groups of which several options are often selected
OPEN_MAPPINGS = ("hydra.launcher.additional_parameters", "hydra.sweeper.baseline", "hydra.sweeper.params")
NONE = {"callbacks": "none", "logger": "csv"}  # options that stand for none; every run writes metrics.csv
_PARSER = OverridesParser.create()


def unknown_option(group: str, option: str, options: Sequence[str]) -> UserError:
    """Returns the error for an option that a config group does not have."""
    nearest = did_you_mean(option, options)
    return UserError(f"Unknown option {group}={option}.{nearest} Valid options: {', '.join(options)}.")


class OptionGroups:
    """Config groups of one command.

    Args:
        command: Name of the command, which is also the name of its primary configuration.
        folders: Directories with configuration files in search order; gptlab's own is the last.
        appended: Directories that Hydra searches after gptlab's own (``hydra.searchpath``).
        primary: Name of the primary configuration if it is another one (``--config-name``).
    """

    def __init__(
        self, command: str, folders: Sequence[Path], appended: Sequence[Path] = (), primary: str | None = None
    ) -> None:
        self.command, self.folders, self.own_folder = command, [*folders, *appended], folders[-1]
        self._top_level_keys = functools.cache(self._read_top_level_keys)
        self._own_keys = self._top_level_keys(primary or command)
        self._defaults = self._read_defaults(primary or command)

    @classmethod
    def of_search_path(cls, command: str, search_path: ConfigSearchPath) -> Self:
        """Returns the config groups of a command that Hydra runs, from Hydra's search path."""
        paths = [element.path or "" for element in search_path.get_path()]
        folders = [Path(path.rpartition("://")[2]) for path in paths if path.startswith(("conf://", "file://", "/"))]
        own = configuration_folder()
        number = folders.index(own)
        return cls(command, folders[: number + 1], folders[number + 1 :])

    def table(self) -> str:
        """Returns a paragraph per config group with its options, wrapped at 80 columns.

        The user's options follow gptlab's, with their directory: ``optimizer: adamw, muon; from conf/: lion``.
        """
        lines = []
        for group in sorted(self._own_keys - {"hydra"} | self._user_groups()):
            if options := self.options(group):
                text = f"{group}: {self._by_folder(group, options)}"
                lines.append(fill(text, 80, subsequent_indent="  ", break_on_hyphens=False) + "\n")
        return printable("".join(lines))  # Hydra prints it; file names may come from somebody else

    def options(self, group: str) -> list[str]:
        """Returns the sorted options of a config group, without the experiments of other commands."""
        return self.fitting_options(group, sorted(self._folders_of_options(group)))

    def normalize(self, overrides: Iterable[str]) -> list[str]:
        """Returns overrides in which those that select an option of a group have a form that Hydra accepts.

        ``+group=option`` becomes ``group=option``, since Hydra rejects ``+`` for a group that is in the defaults list.
        No option (``group=null``, ``group=[]`` or ``~group``) becomes the option that stands for none, or the deletion
        of the group from the defaults list. A mapping with any entries is added by ``++``. Overrides of other config
        keys and sweeps over options are returned unchanged.

        Raises:
            UserError: A group has no such option or needs one, or several of its options can be combined, and it is
                unclear whether the option is to replace or to extend the default.
        """
        overrides = list(overrides)
        for override in overrides:
            group, is_replaced = override.removeprefix("~"), any(o.startswith(f"+{override[1:]}") for o in overrides)
            if override.startswith("~") and self.options(group) and not is_replaced:
                self._none(group, f"{group}=null")  # raises an error if the group needs an option
        return [found for override in overrides if (found := self._normalize(override)) is not None]

    def _normalize(self, override: str) -> str | None:
        """Returns one override of ``normalize``; None if nothing is to be overridden."""
        try:
            parsed = _PARSER.parse_override(override)
        except HydraException:  # Hydra reports it
            return override
        group, value = parsed.key_or_group, parsed.value()
        is_entry = group.startswith(tuple(f"{mapping}." for mapping in OPEN_MAPPINGS))
        if (is_entry or (group in OPEN_MAPPINGS and isinstance(value, dict))) and not override.startswith(("+", "~")):
            return f"++{override}"  # without ++, Hydra accepts only the keys that the mapping has
        in_defaults = group.startswith("hydra/") or group in self._defaults
        options = self.options(group)
        if group == SWEEPS and (parsed.is_sweep_override() or (isinstance(value, list) and len(value) > 1)):
            raise UserError(f"{override}: a command runs one sweep. Run it once for each of them.")
        if not (in_defaults or options) or parsed.package is not None or parsed.is_sweep_override():
            return override
        if isinstance(value, dict) and not override.startswith("~"):
            return override
        if value in (None, "", []):
            return self._none(group, override) if options or in_defaults else override
        wrong = [name for name in (value if isinstance(value, list) else [value]) if not isinstance(name, str)]
        if wrong:
            raise unknown_option(
                group, json.dumps(wrong[0]) if isinstance(value, list) else override.partition("=")[2], options
            )
        if not (override.startswith("+") and in_defaults):
            return override
        if group in COMBINED and not isinstance(value, list):
            raise UserError(
                f"{override}: {group} already has an option. To replace it: {group}={value}. To have several options: "
                f"{group}=[<option>,{value}]"
            )
        return override.lstrip("+")

    def _none(self, group: str, override: str) -> str | None:
        """Returns the override that selects no option of a group; see ``normalize``."""
        if group in NONE:
            return f"{group}={NONE[group]}"
        if group == EXPERIMENT or self._defaults.get(group, "") is None:
            return f"~{group}"
        if group not in self._defaults and not group.startswith("hydra/"):  # a group of the user
            return None
        if override.startswith("~"):  # +<group>._target_ may follow
            return override
        valid = f" Valid options: {', '.join(options)}." if (options := self.options(group)) else ""
        raise UserError(f"{override}: {group} needs an option.{valid}")

    def fitting_options(self, group: str, options: Iterable[str]) -> list[str]:
        """Returns the options without the experiments of other commands."""
        return [option for option in options if group != EXPERIMENT or not self._other_command(option)]

    def check_is_no_sweep(self, overrides: Sequence[str]) -> None:
        """Raises UserError if a predefined sweep is selected without -m, unless for a single run of it."""
        if any(override.lstrip("+").startswith("hydra.mode=") for override in overrides):
            return
        for override in overrides:
            key, _, value = override.lstrip("+").partition("=")
            if key == SWEEPS and value not in ("", "null", "[]"):
                raise UserError(
                    f"{override} is a sweep of several runs. To start it: python -m gptlab.train -m {override}"
                )

    def check_experiments(self, overrides: Iterable[str]) -> None:
        """Checks the experiments selected on the command line.

        Raises:
            UserError: An experiment is for another command; the message names the command.
        """
        for override in overrides:
            key, _, value = override.partition("=")
            for name in re.findall(r"[\w./-]+", value) if key == EXPERIMENT else ():
                if other := self._other_command(name):
                    foreign = ", ".join(sorted(self._top_level_keys(f"{EXPERIMENT}/{name}") - self._own_keys))
                    raise UserError(
                        f"{EXPERIMENT}={name} is for python -m gptlab.{other}: it sets {foreign}, which "
                        f"gptlab.{self.command} does not have."
                    )

    def _other_command(self, experiment: str) -> str | None:
        """Returns the command that an experiment is for; None if that is this command, or if there is none."""
        keys = self._top_level_keys(f"{EXPERIMENT}/{experiment}")
        if keys <= self._own_keys:
            return None
        commands = {path.stem: self._top_level_keys(path.stem) for path in self.own_folder.glob("*.yaml")}
        fitting = [name for name, known in commands.items() if EXPERIMENT in known and keys <= known]
        # the one with the fewest keys, since other commands may have a superset of them
        return min(fitting, key=lambda name: (len(commands[name]), name), default=None)

    def _by_folder(self, group: str, options: Sequence[str]) -> str:
        """Returns the options as text: gptlab's own, then those of each of the user's directories."""
        folder_of, texts = self._folders_of_options(group), []
        for folder in sorted(self.folders, key=lambda folder: folder != self.own_folder):
            names = [
                f"{option} (replaces gptlab's)" if self._replaces(folder, f"{group}/{option}") else option
                for option in options
                if folder_of[option] == folder
            ]
            if names:
                origin = "" if folder == self.own_folder else f"from {_display(folder)}: "
                texts.append(origin + ", ".join(names))
        return "; ".join(texts)

    def _folders_of_options(self, group: str) -> dict[str, Path]:
        """Returns the options of a group, each with the first directory that has it."""
        files = ((folder, path) for folder in reversed(self.folders) for path in (folder / group).glob("*.yaml"))
        return {path.stem: folder for folder, path in files if path.is_file()}

    def _replaces(self, folder: Path, file: str) -> bool:
        return folder != self.own_folder and (self.own_folder / f"{file}.yaml").is_file()

    def _user_groups(self) -> set[str]:
        """Returns the groups in the user's directories, without gptlab's groups that the command does not have."""
        found = {
            path.parent.relative_to(folder).as_posix()
            for folder in self.folders
            if folder != self.own_folder
            for pattern in ("*/*.yaml", "*/*/*.yaml")
            for path in folder.glob(pattern)
        }
        tops = {group: group.partition("/")[0] for group in found - {"hydra"}}
        return {group for group, top in tops.items() if top in self._own_keys or not (self.own_folder / top).is_dir()}

    def _read_defaults(self, file: str) -> dict[str, Any]:
        """Returns the options in the defaults list of a primary configuration by group; None for no option."""
        found: dict[str, Any] = {}
        for entry in self._read(file).get("defaults") or ():
            if isinstance(entry, dict):
                found |= {str(key): option for key, option in entry.items() if " " not in str(key)}
            elif entry != "_self_":
                found |= self._read_defaults(entry)
        return found

    def _read(self, file: str) -> dict[str, Any]:
        """Returns the content of a file; empty if Hydra could not read it."""
        try:
            is_primary = "/" not in file and (self.own_folder / f"{file}.yaml").is_file()  # always gptlab's
            folders = [self.own_folder] if is_primary else self.folders
            path = next(path for folder in folders if (path := folder / f"{file}.yaml").is_file())
            values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (StopIteration, OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    def _read_top_level_keys(self, file: str) -> set[str]:
        """Returns the groups and keys at the top level of a file; empty if Hydra could not read it."""
        values = self._read(file)
        names = {str(name) for name in values} - {"defaults"}
        for entry in values.get("defaults") or ():
            for key in entry if isinstance(entry, dict) else (entry,):
                chosen = posixpath.join("/", posixpath.dirname(file), str(key).rpartition(" ")[2].partition("@")[0])[1:]
                if isinstance(entry, dict) or posixpath.dirname(chosen) != posixpath.dirname(file):
                    names.add(chosen.partition("/")[0])
                elif key != "_self_":
                    names |= self._top_level_keys(chosen)  # of an included file
        return names


def _display(folder: Path) -> str:
    """Returns a directory for messages, relative to the working directory if it is in there."""
    return f"{folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}/"
