"""The documents: links and anchors lead somewhere, named files exist, and the map of the code names every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "hyperadapters"
OTHERS = (ROOT / "benchmarks", ROOT / "examples", PACKAGE / "demo_data")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(folder / "README.md" for folder in OTHERS)])
ARCHITECTURE = ROOT / "docs" / "architecture.md"
HISTORY = {"CHANGELOG.md"}
"""Documents that also name files of earlier versions."""
LINE_LENGTH = 120

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def _anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", _without_code(document.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    text = _without_code(document.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@each_document
def test_named_files_of_the_project_exist(document: Path) -> None:
    """A name in code style that ends in `.py` is a path from the project, the package or a folder of it."""
    if document.name in HISTORY:
        return
    names = set(re.findall(r"`([\w/]+\.py)`", document.read_text(encoding="utf-8")))
    missing = [name for name in sorted(names) if not _exists(name)]
    assert missing == []


@each_document
def test_lines_are_no_longer_than_those_of_the_code(document: Path) -> None:
    """Except for tables, pictures, headings, quoted messages, and words that cannot be broken, such as links."""
    lines = _without_code(document.read_text(encoding="utf-8")).splitlines()
    long = [line for line in lines if len(line) > LINE_LENGTH and not line.startswith(("|", "!", "#", ">"))]
    assert [line for line in long if len(line.split()) > 2] == []


def _exists(name: str) -> bool:
    if any((folder / name).exists() for folder in (ROOT, PACKAGE)):
        return True
    return "/" not in name and any(any(ROOT.glob(f"{top}/**/{name}")) for top in ("src", "tests", "benchmarks"))


def test_the_map_names_every_module_in_the_row_of_its_folder() -> None:
    rows = re.findall(r"^\| \d+ \| (.+?) \| (.+) \|$", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {
        (folder.strip("`/"), file)
        for folders, contents in rows
        for folder in folders.split(", ")
        for file in re.findall(r"`(\w+\.py)`", contents)
    }
    alone = {folder.strip("`") for folders, _ in rows for folder in folders.split(", ")}
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    missing = [
        str(path.relative_to(PACKAGE))
        for path in modules
        if (path.name not in alone if path.parent == PACKAGE else (path.parent.name, path.name) not in named)
    ]
    assert sorted(missing) == []
