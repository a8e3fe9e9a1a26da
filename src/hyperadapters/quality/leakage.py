"""Duplicates in a split, between the splits of a task and between tasks, and equal inputs with different labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hyperadapters.config import Split
from hyperadapters.quality.duplicates import MAX_CANDIDATES, DuplicateGroups, find_duplicates
from hyperadapters.quality.findings import MAX_EXAMPLES, CheckedRow, Finding, RowExample
from hyperadapters.quality.rows import CheckedTask
from hyperadapters.utils.texts import counted, printable

SCALE_PART = 0.1
"""Part of the range of a regression task from which on the targets of equal inputs contradict each other."""
EARLIER: tuple[tuple[Split, Split], ...] = (("train", "test"), ("train", "validation"), ("validation", "test"))
"""Pairs of splits of which the second should have no input of the first."""

Members = dict[int, list[CheckedRow]]
"""Rows by the number of their group of equal inputs."""


class _Copy(NamedTuple):
    """A row that another row copies.

    Attributes:
        row: The later row.
        other: The row of which it is a copy.
        similarity: None if they are equal but for case, spaces and punctuation, otherwise their similarity.
    """

    row: CheckedRow
    other: CheckedRow
    similarity: float | None

    def example(self) -> RowExample:
        how = "equal to" if self.similarity is None else f"similarity {self.similarity:.2f} to"
        labels = "" if self.row.target == self.other.target else ", which has another label"
        return RowExample.of(self.row, f"{how} {self.other.place}{labels}")


def check_duplicates(tasks: Sequence[CheckedTask]) -> tuple[list[Finding], list[str]]:
    """Find duplicates and near-duplicates in and across the splits and tasks, and contradictory labels.

    Args:
        tasks: The tasks with their rows.

    Returns:
        The findings, and notes on what was not compared.

    Raises:
        MissingPackageError: If datasketch is not installed.
    """
    rows = [row for data in tasks for row in data.rows]
    groups = find_duplicates([row.texts for row in rows])
    members: dict[tuple[str, Split], Members] = defaultdict(lambda: defaultdict(list))
    for row, group in zip(rows, groups.group_of, strict=True):
        members[row.task, row.split][group].append(row)
    findings = []
    for data in tasks:
        findings += [*_between_splits(data, members, groups), *_in_splits(data, members, groups)]
        findings += [*_between_tasks(data, tasks, members, groups), *_contradictions(data, members)]
    notes = []
    if groups.capped:
        notes.append(
            f"{counted(groups.capped, 'input')} with very many near-duplicates were compared with {MAX_CANDIDATES} of "
            "them only."
        )
    return findings, notes


def _copies(rows: Members, others: Members, groups: DuplicateGroups) -> tuple[list[_Copy], list[_Copy]]:
    """Return the copies among rows of which other rows are equal, and of which others are only almost equal."""
    equal, almost = [], []
    for group, found in rows.items():
        if group in others:
            equal += [_Copy(row, others[group][0], None) for row in found]
            continue
        near = {other: value for other, value in groups.neighbours.get(group, {}).items() if other in others}
        if near:
            best = max(near, key=near.__getitem__)
            almost += [_Copy(row, others[best][0], near[best]) for row in found]
    return equal, sorted(almost, key=lambda copy: -(copy.similarity or 0))


def _between_splits(
    data: CheckedTask, members: dict[tuple[str, Split], Members], groups: DuplicateGroups
) -> Iterator[Finding]:
    name = data.task.name
    for first, second in EARLIER:
        equal, almost = _copies(members[name, second], members[name, first], groups)
        of_rows = f"of {len(data.splits.get(second, ())):,} {second} rows"
        if equal:
            yield Finding(
                "leakage",
                "error",
                name,
                len(equal),
                f"{len(equal):,} {of_rows} are {first} rows too, but for case, spaces and punctuation.",
                f"Remove them from the {first} rows; otherwise the {second} score is too good.",
                _examples(equal),
            )
        if almost:
            yield Finding(
                "near_leakage",
                "warning",
                name,
                len(almost),
                f"{len(almost):,} {of_rows} are almost equal to {first} rows{_with_other_labels(almost)}.",
                f"Look at them. Those that are copies belong into one split; otherwise the {second} score is too good.",
                _examples(almost),
            )


def _in_splits(
    data: CheckedTask, members: dict[tuple[str, Split], Members], groups: DuplicateGroups
) -> Iterator[Finding]:
    name = data.task.name
    for split in data.splits:
        found = members[name, split]
        repeated = [_Copy(row, rows[0], None) for rows in found.values() for row in rows[1:]]
        if repeated:
            yield Finding(
                "duplicates",
                "info",
                name,
                len(repeated),
                f"{counted(len(repeated), f'{split} row')} repeat earlier ones, but for case, spaces and punctuation.",
                "Remove them, unless they stand for how often such inputs come.",
                _examples(repeated),
            )
        pairs = [(group, other) for group in found for other in groups.neighbours.get(group, {}) if other in found]
        almost = [
            _Copy(found[group][0], found[other][0], groups.neighbours[group][other])
            for group, other in pairs
            if other < group
        ]
        if almost:
            count = sum(len(found[group]) for group in {group for group, _ in pairs})
            yield Finding(
                "near_duplicates",
                "info",
                name,
                count,
                f"{counted(count, f'{split} row')} are almost equal to others of the same split"
                f"{_with_other_labels(almost)}.",
                "Look at a few. Many variants of one text teach less than their number says.",
                _examples(sorted(almost, key=lambda copy: -(copy.similarity or 0))),
            )


def _between_tasks(
    data: CheckedTask,
    tasks: Sequence[CheckedTask],
    members: dict[tuple[str, Split], Members],
    groups: DuplicateGroups,
) -> Iterator[Finding]:
    """Find rows that are evaluated and on which another task trains, and training rows that two tasks share."""
    name = data.task.name
    for split in data.splits:
        copies, of_tasks, almost = [], Counter[str](), 0
        for other in tasks:
            if other.task.name != name:
                equal, similar = _copies(members[name, split], members[other.task.name, "train"], groups)
                copies += equal if split == "train" else [*equal, *similar]
                of_tasks[other.task.name] = len(equal) if split == "train" else len(equal) + len(similar)
                almost += len(similar)
        count = len({id(copy.row) for copy in copies})
        if not count:
            continue
        shown = ", ".join(f"{printable(other)} ({number})" for other, number in of_tasks.most_common(3) if number)
        if split == "train":
            yield Finding(
                "shared_inputs",
                "info",
                name,
                count,
                f"{counted(count, 'training row')} are training rows of other tasks too: {shown}.",
                "An input without a task can only be routed to one of them; name the task in requests.",
                _examples(copies),
            )
        else:
            yield Finding(
                "leakage_between_tasks",
                "warning",
                name,
                count,
                f"{counted(count, f'{split} row')} are equal or almost equal to training rows of other tasks: {shown}.",
                f"Remove them from the training rows of these tasks, if their labels say something about the {split} "
                "rows, because the tasks share parameters.",
                _examples(copies),
            )


def _contradictions(data: CheckedTask, members: dict[tuple[str, Split], Members]) -> Iterator[Finding]:
    """Find equal inputs with different targets. A text-to-text task may have several right answers."""
    if data.task.kind == "text-to-text":
        return
    together: Members = defaultdict(list)
    for split in data.splits:
        for group, rows in members[data.task.name, split].items():
            together[group] += rows
    numbers = [float(row.target) for row in data.rows] if data.task.kind == "regression" else [0.0]
    tolerance = SCALE_PART * (max(numbers) - min(numbers))
    found = [rows for rows in together.values() if _differ(rows, data.task.kind == "regression", tolerance)]
    if found:
        examples = [RowExample.of(row, f"label {printable(str(row.target))}") for rows in found for row in rows]
        yield Finding(
            "contradictory",
            "warning",
            data.task.name,
            len(found),
            f"{counted(len(found), 'input')} with different labels in {sum(map(len, found)):,} rows.",
            "Decide on one label for each, or remove all rows of the input.",
            tuple(examples[:MAX_EXAMPLES]),
        )


def _differ(rows: Sequence[CheckedRow], is_number: bool, tolerance: float) -> bool:
    if not is_number:
        return len({row.target for row in rows}) > 1
    numbers = [float(row.target) for row in rows]
    return len(numbers) > 1 and max(numbers) - min(numbers) > tolerance


def _with_other_labels(copies: Sequence[_Copy]) -> str:
    count = sum(copy.row.target != copy.other.target for copy in copies)
    return f", {count:,} of them with another label" if count else ""


def _examples(copies: Sequence[_Copy]) -> tuple[RowExample, ...]:
    return tuple(copy.example() for copy in copies[:MAX_EXAMPLES])
