"""What can be chosen for a command, read off the files of conf/. Imports no torch.

An experiment is for the commands that have all that it sets: one that sets ``run`` is for gptlab.evaluate.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from gptlab.errors import UserError

EXPERIMENT = "experiment"


class Groups:
    """The groups of a command, and the options that are for it.

    Args:
        command: What it is called, and its primary configuration.
        folders: Of configuration files, the first ones first; gptlab's own is the last.
    """

    def __init__(self, command: str, folders: Sequence[Path]) -> None:
        self.command, self.folders = command, folders
        self._has = self._set_by(command)

    def table(self) -> str:
        """List the groups with their options, a line each."""
        lines = []
        for group in sorted(self._has - {"hydra"}):
            options = {path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")}
            if options:
                lines.append(f"{group}: {', '.join(self.own(group, sorted(options)))}\n")
        return "".join(lines)

    def own(self, group: str, options: Iterable[str]) -> list[str]:
        """Leave out what is for another command."""
        return [option for option in options if group != EXPERIMENT or not self._other(option)]

    def check(self, arguments: Iterable[str]) -> None:
        """Look at the experiments of a command line; UserError says which command one is for, if not for this one."""
        for argument in arguments:
            key, _, value = argument.partition("=")
            for name in re.findall(r"[\w./-]+", value) if key == EXPERIMENT else ():
                if other := self._other(name):
                    foreign = ", ".join(sorted(self._set_by(f"{EXPERIMENT}/{name}") - self._has))
                    raise UserError(
                        f"{EXPERIMENT}={name} is for python -m gptlab.{other}: it sets {foreign}, which "
                        f"gptlab.{self.command} has not."
                    )

    def _other(self, experiment: str) -> str | None:
        """Name the command that an experiment is for; None where it is this one, and where it fits none."""
        sets = self._set_by(f"{EXPERIMENT}/{experiment}")
        if sets <= self._has:
            return None
        commands = {path.stem: self._set_by(path.stem) for path in self.folders[-1].glob("*.yaml")}
        fitting = [name for name, has in commands.items() if EXPERIMENT in has and sets <= has]
        # the one with the fewest settings: others may take all that it takes, and more
        return min(fitting, key=lambda name: (len(commands[name]), name), default=None)

    def _set_by(self, file: str) -> set[str]:
        """Name the groups and settings of the first level that a file has; none where Hydra could not read it."""
        try:
            path = next(path for folder in self.folders if (path := folder / f"{file}.yaml").is_file())
            values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (StopIteration, OSError, UnicodeDecodeError, yaml.YAMLError):
            return set()
        if not isinstance(values, dict):
            return set()
        names = {str(name) for name in values} - {"defaults"}
        for entry in values.get("defaults") or ():
            for key in entry if isinstance(entry, dict) else (entry,):
                chosen = posixpath.join("/", posixpath.dirname(file), str(key).rpartition(" ")[2].partition("@")[0])[1:]
                if isinstance(entry, dict) or posixpath.dirname(chosen) != posixpath.dirname(file):
                    names.add(chosen.partition("/")[0])
                elif key != "_self_":
                    names |= self._set_by(chosen)  # what it begins with
        return names
