"""What a check of data finds, and the verdict on it in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hyperadapters.config import Kind, Split
from hyperadapters.utils.texts import counted, printable

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The training fails or its scores mean nothing; the data should be looked at before; it is good to know."""
MAX_EXAMPLES = 1000
"""Number of rows that a finding names at most."""
MAX_EXCERPT = 120
"""Number of characters of a text that is shown."""


@dataclass(frozen=True, slots=True)
class RowExample:
    """A row that a finding is about.

    Attributes:
        place: Location of the row, such as "train.csv, line 3".
        text: Beginning of its text, or of both texts of a pair.
        note: What is wrong with it.
    """

    place: str
    text: str
    note: str = ""

    @classmethod
    def of(cls, row: CheckedRow, note: str = "") -> RowExample:
        """Return the example of a row.

        Args:
            row: The row.
            note: What is wrong with it. Default: nothing more than the finding says.
        """
        return cls(row.place, excerpt(" / ".join(row.texts)), note)


@dataclass(frozen=True)
class Finding:
    """A fault or a peculiarity of the data.

    Attributes:
        check: Name of the check, such as "leakage".
        severity: "error", "warning" or "info".
        task: Name of the task.
        count: Number of rows, or of labels where the message counts those.
        message: What was found, in a sentence.
        advice: What to do about it, in a sentence.
        examples: Rows that it is about, up to `MAX_EXAMPLES`.
    """

    check: str
    severity: Severity
    task: str
    count: int
    message: str
    advice: str
    examples: tuple[RowExample, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens of the inputs of a task, with special tokens.

    Attributes:
        median: Half of the inputs have at most so many.
        percentile_95: 95 of 100 inputs have at most so many.
        longest: Largest number.
        max_length: Maximum number of tokens in training; longer inputs are truncated.
        truncated: Number of inputs that are truncated.
    """

    median: int
    percentile_95: int
    longest: int
    max_length: int
    truncated: int


@dataclass(frozen=True)
class TaskSummary:
    """The numbers of a task.

    Attributes:
        name: Name of the task.
        kind: Kind of the task.
        rows: Number of rows of each split.
        labels: Number of training rows of each label of a classification task.
        lengths: Lengths of its inputs in all splits.
    """

    name: str
    kind: Kind
    rows: dict[Split, int]
    labels: dict[str, int]
    lengths: Lengths


@dataclass(frozen=True)
class QualityReport:
    """Result of a check.

    Attributes:
        tasks: Numbers of each task.
        findings: What was found, the gravest first.
        notes: How the data were examined, and what was not examined.
    """

    tasks: list[TaskSummary]
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)

    def worst(self) -> Severity | None:
        """Return the severity of the gravest finding, or None if there is no finding."""
        found = {finding.severity for finding in self.findings}
        return next((severity for severity in SEVERITIES if severity in found), None)

    def verdict(self) -> str:
        """Return the verdict in words."""
        counts = Counter(finding.severity for finding in self.findings)
        rows = sum(sum(task.rows.values()) for task in self.tasks)
        of_what = f"{counted(rows, 'row')} of {counted(len(self.tasks), 'task')}"
        if counts["error"]:
            rest = f" and {counted(counts['warning'], 'warning')}" if counts["warning"] else ""
            return (
                f"Not ready: {counted(counts['error'], 'error')}{rest} in {of_what}. Correct the errors before you "
                "train, because the training would fail or its scores would not mean what they say."
            )
        if counts["warning"]:
            return (
                f"Usable after a look: {counted(counts['warning'], 'warning')} in {of_what}. A training works, and is "
                "likely to be better when you have looked at them."
            )
        return f"Ready: no fault was found in {of_what}."

    def as_dict(self) -> dict[str, Any]:
        """Return the report as values of JSON."""
        return {"verdict": self.verdict(), "worst": self.worst(), **asdict(self)}


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A readable row of the data that are checked.

    Attributes:
        task: Name of its task.
        split: Its split.
        texts: Its text, or the two texts of a pair.
        target: Its label, number or target text.
        place: Location of the row, such as "train.csv, line 3".
    """

    task: str
    split: Split
    texts: tuple[str, ...]
    target: str | float
    place: str


def excerpt(text: str) -> str:
    """Return the beginning of a text in one line, in which characters that are not printable are escaped.

    Args:
        text: Text from outside.
    """
    line = " ".join(text[: 4 * MAX_EXCERPT].split())
    short = line if len(line) <= MAX_EXCERPT and len(text) <= 4 * MAX_EXCERPT else f"{line[: MAX_EXCERPT - 1]}…"
    return printable(short)


def row_examples(rows: Sequence[CheckedRow], note: str = "") -> tuple[RowExample, ...]:
    """Return the examples of the first rows.

    Args:
        rows: Rows that a finding is about.
        note: What is wrong with each of them. Default: nothing more than the finding says.
    """
    return tuple(RowExample.of(row, note) for row in rows[:MAX_EXAMPLES])
