"""Writes a user's own project: a package of components with configuration, experiments and tests. Imports no torch."""

import importlib.util
import keyword
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from gptlab.errors import UserError, failure_reason
from gptlab.projects.nanogpt_experiment import Experiment, write_experiment

TEMPLATE = Path(__file__).parent / "template"
PACKAGE = "mylab"  # name of the package in the template
DIRECTORIES = ("conf", "outputs", "tests")  # of a project


def check_package_name(name: str) -> None:
    """Checks that a name is valid for a new Python package and its distribution.

    Raises:
        UserError: The name is not an identifier, is a keyword, or is that of an importable module or a directory.
    """
    if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name} is not a valid name for a Python package: it should have letters, digits and underscores, begin "
            "with a letter, not end with an underscore, and not be a keyword."
        )
    if name in DIRECTORIES:
        raise UserError(f"{name} is a directory of every project. Choose another name for the package.")
    if name in sys.stdlib_module_names or _is_importable(name):
        raise UserError(f"{name} is an existing Python module, which the package would hide. Choose another name.")


def _is_importable(name: str) -> bool:
    """Whether a module of this name exists; a directory without __init__.py is not counted."""
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # __spec__ is not set
        return True
    return found is not None and found.origin is not None


def template_files() -> list[Path]:
    """Returns the files of the template, relative to it, without caches of Python and its tools."""
    files = sorted(path.relative_to(TEMPLATE) for path in TEMPLATE.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def write_project(directory: Path, name: str, experiments: Iterable[Experiment]) -> None:
    """Writes a project, whole or not at all.

    Args:
        directory: Directory of the project, which must not exist or be empty.
        name: Name of the package.
        experiments: Experiments in addition to those of the template.

    Raises:
        UserError: The directory is not empty or cannot be written, or an experiment has the name of another one.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty directory. Choose another name, or move it.")
    unfinished = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        unfinished.mkdir()
        _write_template(unfinished, name)
        _write_experiments(unfinished / "conf" / "experiment", experiments)
        unfinished.replace(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {failure_reason(error)}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_template(directory: Path, name: str) -> None:
    for path in template_files():
        target = directory / str(path).replace(PACKAGE, name)
        target = target.with_name(".gitignore") if target.name == "gitignore" else target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((TEMPLATE / path).read_text(encoding="utf-8").replace(PACKAGE, name), encoding="utf-8")


def _write_experiments(directory: Path, experiments: Iterable[Experiment]) -> None:
    for experiment in experiments:
        path = directory / f"{experiment.name}.yaml"
        if path.exists():
            raise UserError(f"The project already has an experiment named {experiment.name}. Rename the file.")
        path.write_text(write_experiment(experiment), encoding="utf-8")
