"""docs/paper-to-code.md: every function that it names exists, in the file that it links to, with the line it quotes."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SOURCE = DOCS.parent / "src"
ROW = re.compile(r"^\| .+ \| \[`([\w.]+)`\]\(([^)]+)\) \| `([^`]+)` \|$", flags=re.MULTILINE)
LINES = (DOCS / "paper-to-code.md").read_text(encoding="utf-8").splitlines()
ROWS = ROW.findall("\n".join(LINES))


def test_every_row_of_a_table_has_a_function_and_its_line() -> None:
    tables = [line for line in LINES if line.startswith("| ") and not line.endswith("| function | line |")]
    assert len(ROWS) == len(tables) > 0


@pytest.mark.parametrize(("name", "link", "line"), ROWS)
def test_the_function_has_the_line_of_its_equation(name: str, link: str, line: str) -> None:
    module = (DOCS / link).resolve().relative_to(SOURCE).with_suffix("")
    found = import_module(".".join(module.parts))
    for part in name.split("."):
        found = getattr(found, part)
    assert line in inspect.getsource(found)
