"""Readers: subclasses of ``DocumentReader``, which yield the documents of a corpus."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gptlab.data.sources.component import DocumentReader


class Docstrings(DocumentReader):
    """Docstrings of Python's standard library, one document each.

    Args:
        packages: Names of the packages to read.
    """

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def documents(self) -> Iterator[tuple[str, str]]:
        """Yields the names and texts of the documents."""
        library = Path(sysconfig.get_path("stdlib"))
        for package in self.packages:
            for path in sorted((library / package).rglob("*.py")):
                for name, text in read_docstrings(path):
                    yield f"{path.relative_to(library).as_posix()}:{name}", text

    def fingerprint(self) -> str:
        """Returns Python's version, so that the documents are read again when it changes."""
        return sys.version


def read_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the line number and the text of every docstring of a Python file."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield str(getattr(node, "lineno", 0)), text + "\n"
