"""Directories of the user's configuration files, which are searched before gptlab's own. Imports no torch."""

import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab.errors import UserError, failure_reason
from gptlab.terminal import print_message, printable
from gptlab.training.distributed.processes import is_first_rank

FLAG = "--config-dir"
VARIABLE = "GPTLAB_CONF"


def configuration_folder() -> Path:
    """Returns the directory conf/ of the installed package or, if it has none, of the checkout."""
    package = Path(__file__).parents[1]
    return next(folder / "conf" for folder in (package, package.parents[1]) if (folder / "conf").is_dir())


def is_primary(file: str) -> bool:
    """Whether a file, such as "train", is a primary configuration of gptlab. The user's files do not replace these."""
    return "/" not in file and (configuration_folder() / f"{file}.yaml").is_file()


def user_directories(config_dir: str | None) -> dict[Path, str]:
    """Returns the user's configuration directories in search order, each with where it is named.

    Args:
        config_dir: Value of --config-dir. It is followed by the directories in ``GPTLAB_CONF`` and by ``./conf``.

    Raises:
        UserError: A directory of --config-dir or ``GPTLAB_CONF`` does not exist.
    """
    named = [] if config_dir is None else [(FLAG, config_dir)]
    named += [(VARIABLE, name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    for source, name in named:
        if not Path(name).expanduser().is_dir():
            raise UserError(f"{source}={name} is not a directory (working directory: {Path.cwd()}).")
    named.append(("working directory", "conf"))
    directories: dict[Path, str] = {}
    for source, name in named:
        directory = Path(name).expanduser().absolute()
        # in a checkout, ./conf is gptlab's own
        known = (configuration_folder(), *directories)
        if directory.is_dir() and not any(directory.samefile(other) for other in known):
            directories[directory] = source
    return directories


def list_directories(directories: Mapping[Path, str]) -> str:
    """Returns the directories of configuration files in search order, one per line, for --help."""
    named = [*directories.items(), (configuration_folder(), "gptlab's own")]
    return printable("".join(f"{directory} ({source})\n" for directory, source in named)).replace("$", "$$")


def search_first(directories: Mapping[Path, str]) -> None:
    """Makes Hydra search the directories, in this order, before gptlab's own."""

    class UserSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for directory, source in directories.items():
                search_path.prepend(source, f"{UserDirectory.scheme()}://{directory}", anchor="main")

    Plugins.instance().register(UserDirectory)
    Plugins.instance().register(UserSearchPath)


class UserDirectory(FileConfigSource):
    """Configuration directory of the user. Its options replace gptlab's; its primary configurations do not.

    A directory ./conf may belong to another program that has its own train.yaml.
    """

    # FileConfigSource is not public (checked in hydra-core 1.3.8). Another source would have to duplicate it.

    @staticmethod
    def scheme() -> str:
        """Returns the prefix of these directories in Hydra's search path."""
        return "conf"

    def is_config(self, config_path: str) -> bool:
        """Whether the directory has a file, other than a primary configuration of gptlab."""
        return super().is_config(config_path) and not is_primary(config_path.removesuffix(".yaml"))

    def load_config(self, config_path: str) -> ConfigResult:
        """Reads a file.

        Raises:
            UserError: The file cannot be read, has no keys at its top level or has an invalid interpolation.
            yaml.YAMLError: The file is not valid YAML.
        """
        file = Path(self.path, f"{config_path.removesuffix('.yaml')}.yaml")
        try:
            result = super().load_config(config_path)
        except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
            raise UserError(f"{file} cannot be read: {failure_reason(error).splitlines()[0]}.") from error
        if not OmegaConf.is_dict(result.config):
            raise UserError(f"{file} cannot be read: it has no keys at its top level.")
        if (configuration_folder() / (name := file.relative_to(self.path))).is_file():
            _report_replacement(file, name)
        return result


@functools.cache
def _report_replacement(file: Path, name: Path) -> None:
    """Prints once that a file replaces gptlab's, in case that is not intended."""
    if is_first_rank():
        print_message(f"gptlab: {file} replaces gptlab's own {name}.", file=sys.stderr)
