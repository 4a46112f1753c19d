"""Config groups of a command and the options that fit it, read from the files of conf/. Imports no torch.

An experiment fits the commands that have every key it sets: one that sets ``run`` is for gptlab.evaluate.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from gptlab.errors import UserError

EXPERIMENT = "experiment"


class OptionGroups:
    """Config groups of one command.

    Args:
        command: Name of the command and of its primary configuration.
        folders: Folders with configuration files in the order in which they are searched; gptlab's own is the last.
    """

    def __init__(self, command: str, folders: Sequence[Path]) -> None:
        self.command, self.folders = command, folders
        self._own_keys = self._top_level_keys(command)

    def table(self) -> str:
        """Lists the groups with their options, one line each."""
        lines = []
        for group in sorted(self._own_keys - {"hydra"}):
            options = {path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")}
            if options:
                lines.append(f"{group}: {', '.join(self.fitting_options(group, sorted(options)))}\n")
        return "".join(lines)

    def fitting_options(self, group: str, options: Iterable[str]) -> list[str]:
        """Returns the options without the experiments of other commands."""
        return [option for option in options if group != EXPERIMENT or not self._other_command(option)]

    def check_experiments(self, overrides: Iterable[str]) -> None:
        """Checks the experiments that a command line chooses.

        Raises:
            UserError: One is for another command; the message names that command.
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
        """Returns the command that an experiment is for; None if it is this one, or if it fits none."""
        keys = self._top_level_keys(f"{EXPERIMENT}/{experiment}")
        if keys <= self._own_keys:
            return None
        commands = {path.stem: self._top_level_keys(path.stem) for path in self.folders[-1].glob("*.yaml")}
        fitting = [name for name, known in commands.items() if EXPERIMENT in known and keys <= known]
        # the one with the fewest keys: others may have all of them, and more
        return min(fitting, key=lambda name: (len(commands[name]), name), default=None)

    def _top_level_keys(self, file: str) -> set[str]:
        """Returns the groups and keys at the top level of a file; none if Hydra could not read it."""
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
                    names |= self._top_level_keys(chosen)  # of a file that this one includes
        return names
