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


def counted(number: int, noun: str) -> str:
    """Return a number with a noun in the right form, such as "1,000 rows".

    Args:
        number: The number.
        noun: The noun in its singular form, whose plural ends in "s".
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shown_size(num_bytes: int) -> str:
    """Return a number of bytes in MiB, or in GiB from one GiB on.

    Args:
        num_bytes: Number of bytes.
    """
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
