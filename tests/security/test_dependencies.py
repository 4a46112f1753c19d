"""Versions of dependencies that are known to be malicious cannot be installed with gptlab."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MALICIOUS = ("2.6.2", "2.6.3")  # of lightning on PyPI


def test_malicious_versions_of_lightning_are_excluded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (lightning,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "lightning"]
    assert not any(version in lightning.specifier for version in MALICIOUS)
    pinned = re.findall(r"(?m)^(?:pytorch-)?lightning==(\S+)", (ROOT / "constraints.txt").read_text())
    assert pinned
    assert not set(pinned) & {*MALICIOUS}
