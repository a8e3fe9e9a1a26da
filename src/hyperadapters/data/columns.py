"""Columns of rows: which rows are taken, and which columns are the texts and the label of a row."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from hyperadapters.config import Source
from hyperadapters.errors import DataError, did_you_mean, shown

FIELD = re.compile(r"\{([^{}\[\]]+)((?:\[[^{}\[\]]+\])*)\}")
"""A column in a text of `Source.columns`, such as {premise} or {choices[text][0]}: its name and its parts."""
PART = re.compile(r"\[([^\[\]]+)\]")


def is_taken(values: Mapping[str, Any], source: Source, place: str) -> bool:
    """Return whether a row has the values that its source asks for.

    Args:
        values: Values of the row by column.
        source: Origin of the row.
        place: Location of the row, for messages.

    Raises:
        DataError: If there is no such column.
    """
    return all(_as_text(_value(values, column, "where", place)) == text for column, text in source.where.items())


def rename(values: Mapping[str, Any], source: Source, place: str) -> dict[str, Any]:
    """Return the values of a row, with its texts and its label under the names of the fields of a task.

    Args:
        values: Values of the row by column.
        source: Origin of the row.
        place: Location of the row, for messages.

    Raises:
        DataError: If there is no such column, or a value has no such part.
    """
    return {**values, **{name: _read(values, column, name, place) for name, column in source.columns.items()}}


def used_columns(source: Source, known: Collection[str]) -> list[str]:
    """Return the columns that a source uses; all of them if some are missing, so that a message can name them.

    Args:
        source: Origin of the rows.
        known: Columns of the data.
    """
    columns = {"text": "text", "label": "label", **source.columns}
    used = {name for column in columns.values() for name in _columns_in(column, known)} | source.where.keys()
    return [name for name in known if name in used | {"text_pair"}] if used <= set(known) else list(known)


def _columns_in(column: str, known: Collection[str]) -> list[str]:
    names = [] if column in known else [name for name, _ in FIELD.findall(column)]
    return names or [column]


def _read(values: Mapping[str, Any], column: str, name: str, place: str) -> Any:
    if column in values or not FIELD.search(column):
        return _value(values, column, name, place)

    def filled(match: re.Match[str]) -> str:
        value = _value(values, match[1], name, place)
        for part in PART.findall(match[2]):
            try:
                value = value[int(part)] if isinstance(value, (list, tuple)) else value[part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise DataError(
                    f"{place}: expected a part [{part}] of '{match[1]}' (for {name}: {column}), found {shown(value)}"
                ) from None
        return _as_text(value)

    return FIELD.sub(filled, column)


def _value(values: Mapping[str, Any], column: str, name: str, place: str) -> Any:
    if column not in values:
        raise DataError(
            f"{place}: no column '{column}' (for {name}).{did_you_mean(column, values)} "
            f"Found: {', '.join(map(str, values))}"
        )
    return values[column]


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
