"""docs/promises.md and the tests refer to each other: every cited number and every named test exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "promises.md"
CITATION = re.compile(r"\bpromises?\s+(\d+(?:(?:,\s+|\s+and\s+|,\s+and\s+)\d+)*)", re.IGNORECASE)


def _sections(document: str) -> dict[int, str]:
    """Return the text of each promise by its number."""
    parts = re.split(r"^## Promise (\d+)$", document, flags=re.MULTILINE)
    return dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))


def _named_tests(section: str) -> list[tuple[str, str]]:
    """Return the file name and the function name of each test that a section names."""
    named = []
    for item in re.split(r"^- ", section, flags=re.MULTILINE)[1:]:
        files = re.findall(r"`(test_\w+\.py)`", item)
        assert len(files) == 1, f"expected one test file in each list item, found {files} in: {item}"
        named += [(files[0], name) for name in re.findall(r"`(test_\w+)`", item)]
    return named


def _cited(text: str) -> set[int]:
    return {int(number) for cited in CITATION.findall(text) for number in re.findall(r"\d+", cited)}


def _test_files() -> dict[str, str]:
    """Return the text of each test file but this one, by its name; the folder does not matter."""
    return {path.name: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py") if path != Path(__file__)}


PROMISES = _sections(DOCUMENT.read_text(encoding="utf-8"))


def test_promises_are_numbered_from_1() -> None:
    assert list(PROMISES) == list(range(1, len(PROMISES) + 1))
    assert PROMISES


@pytest.mark.parametrize("number", PROMISES)
def test_a_promise_is_a_sentence_and_the_tests_that_hold_it_exist(number: int) -> None:
    section, files = PROMISES[number], _test_files()
    assert re.match(r"\s+[A-Z][^\n]*", section), "expected the promise before its tests"
    named = _named_tests(section)
    assert named, "expected at least one test"
    missing = [
        f"{file}::{name}" for file, name in named if not re.search(rf"^\s*def {name}\(", files.get(file, ""), re.M)
    ]
    assert missing == []


def test_every_promise_that_a_test_cites_is_written_down_and_names_the_file() -> None:
    citations = {name: _cited(text) for name, text in _test_files().items()}
    assert set().union(*citations.values()) <= PROMISES.keys()
    for name, numbers in citations.items():
        for number in numbers:
            assert name in {file for file, _ in _named_tests(PROMISES[number])}, f"{name} cites promise {number}"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Promise 2 and its edges", {2}),
        ("promises 1, 2, 4 and 5, and what only language models have", {1, 2, 4, 5}),
        ("what arithmetic promises is compared in float64", set()),
    ],
)
def test_citations_are_found(text: str, numbers: set[int]) -> None:
    assert _cited(text) == numbers
