"""docs/troubleshooting.md: the messages that it quotes are those of the library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^> (.+)$", PAGE, flags=re.MULTILINE)


def texts_of(path: Path) -> list[str]:
    """Return all texts in a module, with "..." in the places of values."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            found.append("".join(map(str, parts)))
    return found


TEXTS = [text for path in (ROOT / "src").rglob("*.py") for text in texts_of(path)]


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_library(message: str) -> None:
    """Between the values, which may be longer in the page, the message has the words of one text in this order."""
    words = [part for part in message.split("...") if re.search(r"\w", part)]
    pattern = re.compile(".*".join(map(re.escape, words)), flags=re.DOTALL)
    assert any(pattern.search(text) for text in TEXTS)


def test_messages_are_quoted() -> None:
    assert QUOTED
