"""Texts from outside in a form that can be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text in which characters that are not printable are escaped.

    Such characters could control a terminal, end a comment, or turn the direction of what follows them.

    Args:
        text: Text from outside.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
