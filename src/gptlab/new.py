"""Creates a project with your own parts: python -m gptlab.new <name> [from_nanogpt=<config file>]."""

import sys
from pathlib import Path

from gptlab.errors import UserError, did_you_mean
from gptlab.exit_codes import DONE, exit_status
from gptlab.projects.nanogpt_config import read_nanogpt_config
from gptlab.projects.nanogpt_experiment import Experiment, to_experiment
from gptlab.projects.project import check_package_name, write_project
from gptlab.terminal import install_hooks, print_message

KEYS = ("from_nanogpt",)
HELP = """\
Create a project with your own parts of gptlab's runs.
python -m gptlab.new <name> [from_nanogpt=<config file>]

The project is a directory <name> with a Python package of the same name (a
callback, a logger, an optimizer, a schedule, parts of a model, a loss, a corpus
reader and a tokenizer), configuration files that select them, experiments, a
sweep, tests, a Makefile and a README with the commands. Nothing is overwritten.

Examples
  python -m gptlab.new mylab
  cd mylab && make train
  python -m gptlab.new mylab from_nanogpt=nanoGPT/config/train_gpt2.py
    # also writes the equal experiment. The file is read, not executed

Exit codes: 0 done, 1 failed, 2 invalid command or input, 130 interrupted
(Ctrl-C).
"""


def main() -> None:
    """Creates the project, or prints the help text."""
    install_hooks()
    sys.exit(exit_status(lambda: _run(sys.argv[1:])))


def _run(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print_message(HELP.removesuffix("\n"))
        return DONE
    name, nanogpt_config = parse_arguments(arguments)
    check_package_name(name)
    experiments = [] if nanogpt_config is None else [_read_experiment(nanogpt_config)]
    write_project(Path(name), name, experiments)
    print_message(f"{name}: a project with its own README. Next: cd {name} && make train")
    for experiment in experiments:
        print_message(f"From nanoGPT: cd {name} && python -m gptlab.{experiment.command} experiment={experiment.name}")
    return DONE


def parse_arguments(arguments: list[str]) -> tuple[str, Path | None]:
    """Returns the name of the project and the configuration file of nanoGPT.

    Raises:
        UserError: There is not exactly one name, or an argument is unknown.
    """
    names = [argument for argument in arguments if "=" not in argument]
    values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for key in (*(name for name in names if name.startswith("-")), *values):
        if key not in KEYS:
            raise UserError(f"Unknown argument {key}.{did_you_mean(key, KEYS)} Usage: {HELP.splitlines()[1]}")
    if len(names) != 1:
        raise UserError(f"A project needs one name, not {len(names)}. Usage: {HELP.splitlines()[1]}")
    path = values.get("from_nanogpt")
    return names[0], None if path is None else Path(path).expanduser()


def _read_experiment(path: Path) -> Experiment:
    """Reads the experiment of a configuration of nanoGPT, and prints what is ignored or not equal."""
    config = read_nanogpt_config(path)
    experiment = to_experiment(config)
    for ignored in config.ignored:
        print_message(f"{path}:{ignored.line}: {ignored.source}\n  ignored: {ignored.reason}")
    for note in experiment.notes:
        print_message(f"note: {note}")
    return experiment


if __name__ == "__main__":
    main()
