"""What every command shares: Hydra around it, and sentences instead of tracebacks. Imports no torch."""

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

from gptlab.config.option_groups import Groups
from gptlab.config.schema import no_setting
from gptlab.errors import Diverged, UserError, did_you_mean
from gptlab.exit_codes import DONE, INTERRUPTED, PREEMPTED, SweepEnded, tell
from gptlab.tracking.logs import log_to_console

Task = Callable[[DictConfig], int]


class JobFailed(Exception):  # noqa: N818
    """What a launcher brings back of a job that it ran elsewhere."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Ended(BaseException):
    """The user or the machine wants an end: in a sweep, no other job begins."""

    def __init__(self, status: int) -> None:
        self.status = status


def configuration_folder() -> Path:
    """Return conf/: the package's own in a wheel, else the one at the top of the checkout."""
    package = Path(__file__).parents[1]
    return next(folder / "conf" for folder in (package, package.parents[1]) if (folder / "conf").is_dir())


def command(config_name: str, *, keys: set[str], literal: tuple[str, ...] = ()) -> Callable[[Task], Callable[[], None]]:
    """Turn a task into a command line with Hydra's flags, documented exit statuses and no traceback for mistakes.

    Args:
        config_name: The primary configuration, in conf/.
        keys: Every setting's dotted name, to propose the nearest for one that does not exist.
        literal: Keys whose values are text, never Hydra's grammar.
    """

    def decorate(task: Task) -> Callable[[], None]:
        statuses = [DONE]

        @functools.wraps(task)
        def told(config: DictConfig) -> None:
            log_to_console()  # a launcher's process has not come through main
            try:
                status = task(config)
            except (UserError, Diverged, OmegaConfBaseException) as error:
                status = tell(error)
            if status != DONE and _is_elsewhere():
                raise JobFailed(status)
            if status in (INTERRUPTED, PREEMPTED):
                raise _Ended(status)
            statuses.append(status)  # in a sweep the other jobs go on

        @functools.wraps(task)
        def main() -> None:
            log_to_console()
            wants_traceback = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints for itself, and exits with 1
            try:
                sys.argv[1:] = [_quoted(argument, literal) for argument in sys.argv[1:]]
                groups = _looked_over(config_name)
                around = hydra.main(
                    version_base="1.3", config_path=str(configuration_folder()), config_name=config_name
                )
                around(told)()
            except UserError as error:
                statuses.append(tell(error))
            except (HydraException, OmegaConfBaseException) as error:
                if wants_traceback:
                    raise
                statuses.append(tell(_explain(error, keys, groups)))
            except (JobFailed, SweepEnded) as error:
                statuses.append(error.status)
            except _Ended as error:
                sys.exit(error.status)
            except KeyboardInterrupt:
                sys.exit(INTERRUPTED)
            sys.exit(max(statuses))

        return main

    return decorate


def _is_elsewhere() -> bool:
    """Whether this is a job of a sweep that a launcher runs in another process, on another machine perhaps."""
    config = HydraConfig.get()
    return config.mode == RunMode.MULTIRUN and not config.launcher["_target_"].endswith(".BasicLauncher")


def _looked_over(config_name: str) -> Groups:
    """Look at the command line before Hydra does; return what can be chosen, which --help lists by ${groups:}.

    Raises:
        UserError: It has an experiment of another command, or the one flag of Hydra's that unpickles a file.
    """
    # Hydra's own parser, which has no public name (read in hydra-core 1.3.8): a second one would have to know all of
    # Hydra's flags, and how it lets them be abbreviated
    flags = get_args_parser().parse_args()
    if flags.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={flags.experimental_rerun} is refused: it would unpickle the file, which can run "
            "any code. A run goes on with resume=<run directory>."
        )
    folders = [configuration_folder()] if flags.config_dir is None else [Path(flags.config_dir), configuration_folder()]
    groups = Groups(config_name, folders)
    groups.check(flags.overrides)
    OmegaConf.register_new_resolver("groups", groups.table, replace=True)
    return groups


def _quoted(argument: str, literal: tuple[str, ...]) -> str:
    """Quote the value of an override that Hydra's grammar cannot read (a path with "=", code), or that is text."""
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals or value.startswith(("'", '"')):
        return argument
    try:
        if key not in literal:
            OverridesParser.create().parse_override(argument)
            return argument
    except HydraException:
        pass
    if key in literal:
        value = value.replace("${", r"\${")  # no interpolation
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", value)  # backslashes count only in front of a quote
    trailing = re.search(r"\\*$", escaped)
    return f"{key}='{escaped}{trailing[0] if trailing else ''}'"


def _explain(error: Exception, keys: set[str], groups: Groups) -> UserError:
    """Say in a sentence what Hydra says of a command line."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        options = groups.own(group, error.options)
        nearest = did_you_mean(option, options)
        return UserError(f"{group}={option}: there is no such option.{nearest} There are {', '.join(options)}.")
    if isinstance(error, OverrideParseException):
        return UserError(f"{error.override} cannot be read: {message.splitlines()[0]}")
    if isinstance(error, ConfigCompositionException) and (found := re.search(r"Could not override '([^'@]+)", message)):
        return UserError(no_setting(found[1], keys))
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        message = f"{message}: {error.__cause__}"
    return UserError(message)
