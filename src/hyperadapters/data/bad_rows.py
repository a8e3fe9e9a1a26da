"""Rows that cannot be read: they are an error, or they are skipped, counted and reported."""

from __future__ import annotations

import logging
from typing import Literal

from hyperadapters.errors import DataError, HyperAdaptersError, unknown_name

OnBadRow = Literal["error", "skip"]
CHOICES = ("error", "skip")

logger = logging.getLogger(__name__)


class BadRows:
    """What is done with rows that cannot be read.

    A row is bad if it is no JSON object, has another number of cells than the columns of its file, or has no valid
    text, label or task. Faults of a whole file are always errors: another encoding, a row of several lines with a wrong
    number of cells, whose quotation mark may have opened in any of them, or cells of Parquet that cannot be read.

    Attributes:
        skips: Whether they are skipped.
        count: Number of rows that were skipped.
        first: Error of the first of them, with its file and line.
    """

    def __init__(self, on_bad_row: OnBadRow = "error") -> None:
        """Begin to count.

        Args:
            on_bad_row: "error" (default) to raise the error of the first bad row, or "skip".

        Raises:
            DataError: If `on_bad_row` is another word.
        """
        if on_bad_row not in CHOICES:
            raise DataError("on_bad_row: " + unknown_name("choice", str(on_bad_row), CHOICES))
        self.skips = on_bad_row == "skip"
        self.count, self.first = 0, ""

    def add(self, error: HyperAdaptersError) -> None:
        """Count a bad row, or raise its error if bad rows are errors.

        Args:
            error: What is wrong with the row, with its file and line.
        """
        if not self.skips:
            raise error
        self.first = self.first or str(error)
        self.count += 1

    def note(self) -> str:
        """Return a part of an error message about the rows that were skipped, empty if there are none."""
        return f"; rows that were skipped: {self.count}, the first: {self.first}" if self.count else ""

    def report(self, name: str) -> None:
        """Log how many rows were skipped, if there are any.

        Args:
            name: Name of the task or file.
        """
        if self.count:
            rows = "1 row was skipped because it" if self.count == 1 else f"{self.count} rows were skipped because they"
            logger.warning("%s: %s cannot be read; the first: %s", name, rows, self.first)
