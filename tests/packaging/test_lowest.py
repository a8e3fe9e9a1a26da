"""The lowest versions that `make lowest` installs are those that pyproject.toml accepts."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def lowest(requirement: str) -> tuple[str, str]:
    """The name of a requirement, and its lower bound up to trailing zeros."""
    found = Requirement(requirement)
    (bound,) = [part.version for part in found.specifier if part.operator in (">=", "==")]
    return found.name, bound.removesuffix(".0").removesuffix(".0")


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "tests" / "packaging" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    installed = [line for line in lines if not line.startswith("#")]
    assert sorted(map(lowest, installed)) == sorted(map(lowest, project["dependencies"]))
