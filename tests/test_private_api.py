"""Private API of libraries is used only where docs/architecture.md says so, and each use has a test."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gptlab

SOURCES, TESTS = Path(gptlab.__file__).parent, Path(__file__).parent
DOCS = TESTS.parent / "docs" / "architecture.md"
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}  # documented names of named tuples and of os


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in PUBLIC


@cache
def table() -> dict[str, set[Path]]:
    """Returns the tests of each file that may use private API."""
    text = DOCS.read_text(encoding="utf-8").partition("## Private API of libraries")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    files: dict[str, set[Path]] = {}
    for *_, file, _, test in rows[1:]:
        files.setdefault(file, set()).add(TESTS / test.removesuffix(" |"))
    return files


def used(tree: ast.Module) -> Iterator[str]:
    """Yields the private names that a source imports or reads, except for those of its own classes."""
    own = {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and "id" in vars(node.target)}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names) if not str(module).startswith("gptlab"):
                imported = [f"{module}.{alias.name}" for alias in names]
            case ast.Attribute(value=value, attr=name) if is_private(name) and name not in own:
                if not (isinstance(value, ast.Name) and value.id in ("self", "cls")):
                    yield ast.unparse(node)
                continue
            case _:
                continue
        yield from (name for name in imported if any(map(is_private, name.split("."))))


def shared_with_bases(kind: type) -> set[str]:
    """Returns private names that a class defines or uses and that a library class among its bases has as well."""

    def names(one: type) -> set[str]:
        methods = {
            name: inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
            for name, value in vars(one).items()
        }
        methods = {name: method for name, method in methods.items() if inspect.isfunction(method)}
        read = {name for method in methods.values() for name in method.__code__.co_names}
        return {name for name in methods.keys() | read if is_private(name)}

    bases = [base for base in kind.__mro__[1:] if base.__module__.split(".")[0] not in sys.stdlib_module_names]
    theirs = {name for base in bases if not base.__module__.startswith("gptlab") for name in names(base)}
    return names(kind) & theirs


def test_private_names_are_used_only_in_listed_files():
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        names = set(used(ast.parse(path.read_text(encoding="utf-8"))))
        if names and str(path.relative_to(SOURCES)) not in table():
            found[str(path.relative_to(SOURCES))] = names
    assert found == {}


def test_private_members_of_library_classes_are_used_only_in_listed_files():
    found = {}
    for info in pkgutil.walk_packages([str(SOURCES)], "gptlab."):
        module = importlib.import_module(info.name)
        file = str(Path(str(module.__file__)).relative_to(SOURCES))
        kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == info.name]
        for kind in kinds if file not in table() else ():
            if names := shared_with_bases(kind):
                found[f"{file}: {kind.__name__}"] = names
    assert found == {}


@pytest.mark.parametrize("file", table())
def test_listed_files_and_their_tests_exist(file):
    assert (SOURCES / file).is_file()
    assert table()[file]
    for test in table()[file]:
        assert test.is_file()


def test_the_searches_find_private_names():
    source = "import torch\nfrom hydra._internal import utils\nfrom a import _b\ntorch._c_(x)\nself._own\nx._asdict()"
    assert set(used(ast.parse(source))) == {"hydra._internal.utils", "a._b", "torch._c_"}
    modules = ("training.distributed.process_group", "training.distributed.tensor_parallel", "evaluation.harness")
    kinds = [
        getattr(importlib.import_module(f"gptlab.{module}"), name)
        for module, name in zip(modules, ("SrunEnvironment", "ReplicatedLayer", "HarnessModel"), strict=True)
    ]
    assert [shared_with_bases(kind) for kind in kinds] == [
        {"_validate_srun_variables"},
        {"_apply"},
        {"_loglikelihood_tokens"},
    ]


def test_libraries_with_a_private_use_have_an_upper_bound():
    text = DOCS.read_text(encoding="utf-8").partition("## Private API of libraries")[2]
    libraries = {line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")} - {"library"}
    pyproject = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    for library in libraries:
        names = library.replace("_", "-")
        assert re.search(rf'"{names}>=[\d.]+,<[\d.]+"', pyproject), library
