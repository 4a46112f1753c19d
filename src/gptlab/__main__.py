"""Runs a command: gptlab <command> ..., or python -m gptlab <command> ...; without a command, lists them.

``gptlab train ...`` does the same as ``python -m gptlab.train ...``. Imports no torch.
"""

import ast
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill

from gptlab.errors import UserError, did_you_mean
from gptlab.exit_codes import DONE, exit_status
from gptlab.terminal import install_hooks, print_message

COMMANDS = (
    *("train", "prepare", "plan", "prove", "runs", "report", "sample", "evaluate", "export", "dashboard", "bench"),
    "new",
)


def main() -> None:
    """Runs the command that the command line names, or lists the commands, and exits with its exit code."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        sys.argv[:] = arguments  # the module sets the first one to its file, as with python -m
        runpy.run_module(f"gptlab.{arguments[0]}", run_name="__main__", alter_sys=True)
        return
    install_hooks()
    sys.exit(exit_status(lambda: _answer(arguments)))


def _answer(arguments: list[str]) -> int:
    """Prints the list of commands or the version.

    Raises:
        UserError: The command is unknown.
    """
    match arguments:
        case [] | ["-h" | "--help" | "help", *_]:
            print_message(_list_commands())
        case ["--version", *_]:
            print_message(f"gptlab {_version()}")
        case [name, *_] if "=" in name or name.startswith("-"):
            raise UserError(f"{name}: a command comes first, as in gptlab train {name}. {_names()}")
        case [name, *_]:
            raise UserError(f"Unknown command {name}.{did_you_mean(name, COMMANDS)} {_names()}")
    return DONE


def _version() -> str:
    try:
        return version("gptlab")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def _names() -> str:
    return f"Commands: {', '.join(COMMANDS)}."


def _list_commands() -> str:
    lines = [f"  {name:10} {_describe(name)}" for name in COMMANDS]
    return "\n".join(
        (
            fill(_describe("__init__").rstrip("."), 80),
            "",
            "gptlab <command> [key=value ...], or python -m gptlab.<command> [key=value ...]",
            "",
            *lines,
            "",
            "gptlab <command> --help explains the values and exit codes of a command;",
            "gptlab --version prints the version.",
        )
    )


def _describe(command: str) -> str:
    """Returns the first sentence of a command's docstring, without importing the module."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition(": python -m")[0]


if __name__ == "__main__":
    main()
