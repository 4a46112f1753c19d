"""Turns a function into a command: Hydra, exit statuses, and messages instead of tracebacks. Imports no torch."""

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab.config.base import unknown_key
from gptlab.config.option_groups import OptionGroups
from gptlab.errors import Diverged, UserError, did_you_mean
from gptlab.exit_codes import DONE, INTERRUPTED, PREEMPTED, SweepIncomplete, report_error
from gptlab.tracking.logs import log_to_console

Task = Callable[[DictConfig], int]
Main = Callable[[], None]


class JobFailed(Exception):  # noqa: N818
    """A job that a launcher ran in another process has failed."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _StopSweep(BaseException):
    """The job was interrupted or preempted: no other job of the sweep is started."""

    def __init__(self, status: int) -> None:
        self.status = status


def configuration_folder() -> Path:
    """Returns conf/: that of the installed package, or else the one at the top of the checkout."""
    package = Path(__file__).parents[1]
    return next(folder / "conf" for folder in (package, package.parents[1]) if (folder / "conf").is_dir())


def command(config_name: str, *, keys: set[str], literal_keys: tuple[str, ...] = ()) -> Callable[[Task], Main]:
    """Decorates the main function of a command: Hydra's flags, exit statuses, and no traceback for a user's error.

    Args:
        config_name: Name of the primary configuration in conf/.
        keys: Dotted names of all config keys, of which the nearest is suggested for an unknown one.
        literal_keys: Keys whose values are text, not Hydra's override grammar.
    """

    def decorate(task: Task) -> Main:
        statuses = [DONE]

        @functools.wraps(task)
        def run_task(config: DictConfig) -> None:
            log_to_console()  # in a launcher's process, main was not called
            try:
                status = task(config)
            except (UserError, Diverged, OmegaConfBaseException) as error:
                status = report_error(error)
            if status != DONE and _is_launched_job():
                raise JobFailed(status)
            if status in (INTERRUPTED, PREEMPTED):
                raise _StopSweep(status)
            statuses.append(status)  # in a sweep, the other jobs still run

        @functools.wraps(task)
        def main() -> None:
            log_to_console()
            wants_traceback = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints the error itself, and exits with 1
            try:
                sys.argv[1:] = [_quote_override(argument, literal_keys) for argument in sys.argv[1:]]
                groups = _check_command_line(config_name)
                decorate_with_hydra = hydra.main(
                    version_base="1.3", config_path=str(configuration_folder()), config_name=config_name
                )
                decorate_with_hydra(run_task)()
            except UserError as error:
                statuses.append(report_error(error))
            except (HydraException, OmegaConfBaseException) as error:
                if wants_traceback:
                    raise
                statuses.append(report_error(_to_user_error(error, keys, groups)))
            except (JobFailed, SweepIncomplete) as error:
                statuses.append(error.status)
            except _StopSweep as error:
                sys.exit(error.status)
            except KeyboardInterrupt:
                sys.exit(INTERRUPTED)
            sys.exit(max(statuses))

        return main

    return decorate


def _is_launched_job() -> bool:
    """Whether this is a job of a sweep that a launcher runs in another process, perhaps on another machine."""
    config = HydraConfig.get()
    return config.mode == RunMode.MULTIRUN and not config.launcher["_target_"].endswith(".BasicLauncher")


def _check_command_line(config_name: str) -> OptionGroups:
    """Checks the command line before Hydra reads it, and returns its config groups, which --help lists by ${groups:}.

    Raises:
        UserError: It has an experiment of another command, or the flag of Hydra that unpickles a file.
    """
    # Hydra's own parser, which has no public name (read in hydra-core 1.3.8): a second one would have to know all of
    # Hydra's flags, and how it lets them be abbreviated
    flags = get_args_parser().parse_args()
    if flags.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={flags.experimental_rerun} is refused: it would unpickle the file, which can run "
            "any code. A run is resumed with resume=<run directory>."
        )
    folders = [configuration_folder()] if flags.config_dir is None else [Path(flags.config_dir), configuration_folder()]
    groups = OptionGroups(config_name, folders)
    groups.check_experiments(flags.overrides)
    OmegaConf.register_new_resolver("groups", groups.table, replace=True)
    return groups


def _quote_override(argument: str, literal_keys: tuple[str, ...]) -> str:
    """Quotes the value of an override if Hydra's grammar cannot parse it (a path with "=", code), or if it is text."""
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals or value.startswith(("'", '"')):
        return argument
    try:
        if key not in literal_keys:
            OverridesParser.create().parse_override(argument)
            return argument
    except HydraException:
        pass
    if key in literal_keys:
        value = value.replace("${", r"\${")  # no interpolation
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", value)  # backslashes count only in front of a quote
    trailing = re.search(r"\\*$", escaped)
    return f"{key}='{escaped}{trailing[0] if trailing else ''}'"


def _to_user_error(error: Exception, keys: set[str], groups: OptionGroups) -> UserError:
    """Turns an error of Hydra about a command line into a sentence."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        options = groups.fitting_options(group, error.options)
        nearest = did_you_mean(option, options)
        return UserError(f"{group}={option}: there is no such option.{nearest} There are {', '.join(options)}.")
    if isinstance(error, OverrideParseException):
        return UserError(f"{error.override} cannot be read: {message.splitlines()[0]}")
    if isinstance(error, ConfigCompositionException) and (found := re.search(r"Could not override '([^'@]+)", message)):
        return UserError(unknown_key(found[1], keys))
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        message = f"{message}: {error.__cause__}"
    return UserError(message)
