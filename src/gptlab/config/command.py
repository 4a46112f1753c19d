"""Decorator that turns a function into a command: Hydra, exit codes, error messages. Imports no torch."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import yaml
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab.config.base import unknown_key
from gptlab.config.option_groups import OptionGroups, unknown_option
from gptlab.config.overrides import CommandLine, parse_command_line
from gptlab.config.reference import explain_values
from gptlab.config.search_path import configuration_folder, list_directories, search_first, user_directories
from gptlab.errors import Diverged, OutOfMemory, UserError
from gptlab.exit_codes import CONFIG_ERROR, DONE, INTERRUPTED, PREEMPTED, SweepIncomplete, is_home_missing, report_error
from gptlab.terminal import check_output_is_written, install_hooks
from gptlab.tracking.logs import log_to_console
from gptlab.training.distributed.processes import collect_garbage_rarely

Task = Callable[[DictConfig], int]
Main = Callable[[], None]


class JobFailed(Exception):  # noqa: N818
    """Raised in a launcher's process when its job has failed."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _StopSweep(BaseException):
    """Raised when a job was interrupted or preempted, so that no other job of the sweep starts."""

    def __init__(self, status: int) -> None:
        self.status = status


def command(
    config_name: str,
    *,
    keys: set[str],
    literal_keys: tuple[str, ...] = (),
    subject: str | None = None,
    rewrite: Callable[[Sequence[str]], list[str]] = list,
) -> Callable[[Task], Main]:
    """Decorates the main function of a command: adds Hydra's flags, exit codes, and messages for user errors.

    Args:
        config_name: Name of the primary configuration in conf/.
        keys: Dotted names of all config keys, to suggest the most similar one for an unknown key.
        literal_keys: Keys whose values are taken literally, not parsed by Hydra's override grammar.
        subject: Key of the main input, whose value may also be given without the key: ``gptlab.sample <run>``.
        rewrite: Returns the overrides with which Hydra composes the configuration, for those of the command line.

    Returns:
        The decorator. It turns a function that takes the composed configuration and returns an exit code into a
        ``main`` without arguments, which exits with that code.
    """

    def decorate(task: Task) -> Main:
        statuses = [DONE]

        @functools.wraps(task)
        def run_task(config: DictConfig) -> None:
            collect_garbage_rarely()  # a launcher's process does not call main
            log_to_console()
            try:
                check_hydra(HydraConfig.get())
                status = task(config)
            except (UserError, Diverged, OutOfMemory, OmegaConfBaseException, OSError) as error:
                status = report_error(error)
            except RuntimeError as error:
                if not is_home_missing(error):
                    raise
                status = report_error(error)
            if status != DONE and _is_launched_job():
                raise JobFailed(status)
            if status in (INTERRUPTED, PREEMPTED):
                raise _StopSweep(status)
            statuses.append(status)  # in a sweep, the remaining jobs still run

        @functools.wraps(task)
        def main() -> None:
            collect_garbage_rarely()
            log_to_console()
            install_hooks()
            wants_traceback = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"
            os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints the error and exits with 1
            try:
                line = parse_command_line(sys.argv[1:], keys, literal_keys, subject)
                groups = _check_command_line(config_name, line, rewrite)
                decorate_with_hydra = hydra.main(
                    version_base="1.3", config_path=str(configuration_folder()), config_name=config_name
                )
                try:
                    decorate_with_hydra(run_task)()
                except SystemExit as end:  # Hydra ends --cfg with 1 if its --package does not exist
                    sys.exit(CONFIG_ERROR if line.flags.package is not None and end.code == 1 else end.code)
                if config_name not in ("train", "prove", "bench") or line.flags.cfg or line.flags.info:
                    check_output_is_written()
            except UserError as error:
                statuses.append(report_error(error))
            except (HydraException, OmegaConfBaseException) as error:
                if wants_traceback:
                    raise
                statuses.append(report_error(_to_user_error(error, keys, groups)))
            except yaml.MarkedYAMLError as error:
                if wants_traceback or (mark := error.problem_mark) is None:
                    raise
                statuses.append(report_error(UserError(f"{mark.name}, line {mark.line + 1}: {error.problem}.")))
            except (ValueError, RecursionError) as error:
                if wants_traceback or not _is_raised_by_hydra(error):
                    raise
                statuses.append(report_error(_to_user_error(error, keys, groups)))
            except RuntimeError as error:
                if not is_home_missing(error):
                    raise
                statuses.append(report_error(error))
            except OSError as error:  # after Hydra's, one of which is an OSError
                statuses.append(report_error(error))
            except (JobFailed, SweepIncomplete) as error:
                statuses.append(error.status)
            except _StopSweep as error:
                sys.exit(error.status)
            except KeyboardInterrupt:
                sys.exit(INTERRUPTED)
            sys.exit(max(statuses))

        return main

    return decorate


def check_hydra(hydra_config: HydraConf | DictConfig) -> None:
    """Raises UserError if Hydra's configuration has a value that would have no effect."""
    if hydra_config.output_subdir is not None:
        raise UserError(
            f"hydra.output_subdir={hydra_config.output_subdir} is not supported: config.yaml in the run directory has "
            "the configuration. Leave it at null."
        )
    if hydra_config.job.chdir:
        raise UserError(
            "hydra.job.chdir=true is not supported: paths are relative to the directory in which the command starts. "
            "To set the run directory: hydra.run.dir=<directory>"
        )


def _is_launched_job() -> bool:
    """Whether a launcher runs this job of a sweep in another process, possibly on another machine."""
    config = HydraConfig.get()
    return config.mode == RunMode.MULTIRUN and not config.launcher["_target_"].endswith(".BasicLauncher")


def _check_command_line(
    config_name: str, line: CommandLine, rewrite: Callable[[Sequence[str]], list[str]]
) -> OptionGroups:
    """Checks a command line before Hydra parses it, and sets ``sys.argv`` to what Hydra is to parse.

    Returns:
        The config groups of the command, which --help lists by ${groups:}.

    Raises:
        UserError: The command line has an option that its group does not have, an experiment of another command, a
            flag that the command does not support, or the Hydra flag that unpickles a file.
    """
    flags = line.flags
    if flags.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun={flags.experimental_rerun} is refused: unpickling the file could run arbitrary "
            "code. To resume a run: resume=<run directory>"
        )
    directories = user_directories(flags.config_dir)
    search_first(directories)
    folders, appended = [*directories, configuration_folder()], _appended_folders(line.overrides)
    groups = OptionGroups(config_name, folders, appended, primary=flags.config_name)
    if flags.multirun and config_name != "train":
        raise UserError(f"-m (multirun) is not supported by gptlab.{config_name}. Run the command once for each value.")
    if config_name == "train" and not (flags.multirun or flags.cfg or flags.info or flags.help):
        groups.check_is_no_sweep(line.overrides)
    overrides = groups.normalize(line.overrides)
    groups.check_experiments(overrides)
    sys.argv[1:] = line._replace(overrides=rewrite(overrides)).arguments
    # Hydra resolves the text of --help whenever it composes, and the table reads every file of conf/.
    OmegaConf.register_new_resolver("groups", groups.table if flags.help or flags.cfg else str, replace=True)
    OmegaConf.register_new_resolver("folders", lambda: list_directories(directories), replace=True)
    OmegaConf.register_new_resolver("keys", _explain_keys(folders) if flags.help else str, replace=True)
    return groups


def _explain_keys(folders: Sequence[Path]) -> Callable[..., str]:
    """Returns the resolver of ${keys:}: the values of the composed configuration and their explanations."""

    def explain(*, _root_: DictConfig) -> str:
        return explain_values(_root_, folders).replace("$", "$$")  # Hydra substitutes $CONFIG afterwards

    return explain


def _appended_folders(overrides: Sequence[str]) -> list[Path]:
    """Returns the directories that ``hydra.searchpath`` on the command line appends to the search path."""
    given = [override for override in overrides if override.startswith("hydra.searchpath=")]
    values = [override.value() for override in OverridesParser.create().parse_overrides(given)]
    paths = [str(path).removeprefix("file://") for value in values if isinstance(value, list) for path in value]
    return [Path(path).absolute() for path in paths if "://" not in path]


def _is_raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra raised the error before it called the task: for its flags, or for a defaults list."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals["__name__"]) for frame in frames]
    return modules[-1].startswith("hydra._internal.") or "hydra._internal.defaults_list" in modules


def _several_values(override: str, command: str) -> str:
    """Returns the message for an override with several values in a command that is no sweep."""
    key, _, value = override.partition("=")
    hint = f"As a list: '{key}=[{value}]'. As text: '{key}=\"{value}\"'" if "(" not in value else ""
    if command == "train":
        hint = f"To train a run for each: python -m gptlab.train -m '{override}'. {hint}"
    return f"{override} has several values. {hint}".strip()


def _to_user_error(error: Exception, keys: set[str], groups: OptionGroups) -> UserError:
    """Converts one of Hydra's errors about a command line to a ``UserError``."""
    message = str(error).strip()
    if isinstance(error, RecursionError):
        return UserError(
            "A file includes itself in its defaults list. An option includes another one of its group by its path, as "
            "in `- /model/gpt@model`, not by `- /model: gpt`."
        )
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        # Hydra gives no options for a list, as in callbacks=[default,foo]
        options = groups.options(group) if error.options is None else groups.fitting_options(group, error.options)
        if group and options and not (error.options is None and group.startswith("hydra/")):
            return unknown_option(group, option, options)
        return UserError(message.splitlines()[0] if group else message)  # without Hydra's search path
    if found := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?: requires|$)", message, re.M):
        return UserError(_several_values(found[1], groups.command))
    if isinstance(error, OverrideParseException):
        if message.startswith("Lexer"):  # of the key, since values are quoted
            return UserError(f"{error.override} is not an override, which has the form <key>=<value>.")
        return UserError(f"Invalid override {error.override}: {message.splitlines()[0]}")
    if isinstance(error, ConfigCompositionException) and (found := re.search(r"Could not override '([^']+)'", message)):
        group, at, package = found[1].partition("@")
        if at:
            return UserError(
                f"The defaults list has no {group} for the package {package!r}. To select: {group}=<option>"
            )
        return UserError(unknown_key(group, keys))
    if isinstance(error, ConfigCompositionException) and (found := re.search(r"already at '([^']+)'", message)):
        return UserError(f"{found[1]} already has a value. To change it: {found[1]}=<value>, without +")
    if found := re.match(r"Multiple values for (\S+)\. .*'override \S+: (.*)'", message):
        return UserError(
            f"Multiple values for {found[1]}. A defaults list changes it by `- override /{found[1]}: {found[2]}`."
        )
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        message = f"{message}: {error.__cause__}"
    return UserError(message)
