"""The oldest versions that pyproject.toml allows are those that are tested."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
NOT_TESTED = {"triton-dcn", "onnxruntime", "mypy", "pre-commit", "ruff"}  # itself, not for Python 3.10, other tools


def test_lower_bounds_are_the_versions_of_constraints_oldest():
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(map(Requirement, project["dependencies"]))
    for extra in project["optional-dependencies"].values():
        requirements += map(Requirement, extra)

    versions = {}
    for line in (ROOT / "constraints-oldest.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            versions[name] = version

    checked = 0
    for requirement in requirements:
        if requirement.name in NOT_TESTED:
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == ">="
        assert versions[requirement.name] in SpecifierSet(f"=={specifier.version}.*"), requirement
        checked += 1
    assert checked > 15
