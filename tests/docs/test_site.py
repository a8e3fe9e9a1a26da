"""The documentation site: navigation and overview (its llms.txt) have every page, and the reference what exists."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
GENERATED = ["reference/command-line.md"]
"""Pages that are made when the site is built."""
OVERVIEW = (DOCS / "index.md").read_text(encoding="utf-8")


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    for part in entry.values() if isinstance(entry, dict) else entry:
        yield from _pages(part)


def test_the_navigation_has_every_page_once() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(_pages(navigation)) == sorted([*PAGES, *GENERATED])


def test_the_overview_describes_every_other_page_once_in_the_form_of_llms_txt() -> None:
    assert re.match(r"# \w+\n\n(?:> .+\n)+\n", OVERVIEW)
    items = re.findall(r"^- (.*)$", OVERVIEW, flags=re.MULTILINE)
    described = [re.fullmatch(r"\[[^\]]+\]\(([^)]+)\): \S.*\.", item) for item in items]
    assert sorted(item[1] for item in described if item) == sorted({*PAGES, "../examples/README.md"} - {"index.md"})


def test_the_reference_names_what_exists() -> None:
    reference = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: (\S+)$", reference, flags=re.MULTILINE)
    assert named
    for name in named:
        pkgutil.resolve_name(name)
