"""Reading rows: JSON-lines, CSV, TSV, Parquet, data sets of the Hub, the demo data.

JSON-lines and CSV are read with the standard library, line by line, because an error has to name the line.
Everything else goes through pyarrow and `datasets`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hyperadapters.config import SPLITS, Source, Split
from hyperadapters.errors import DataError, did_you_mean, unknown_name

PARQUET_ROWS = 1024
"""Rows of a Parquet file that are held at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """Values by column, and where they stand (for messages)."""

    values: dict[str, Any]
    place: str


def read_source(source: Source, split: Split) -> list[Row] | None:
    """Read the rows of one split, columns renamed to text, text_pair and label.

    Returns:
        None when the source does not have the split (it may be cut from another one).

    Raises:
        DataError: a file is missing, empty or unreadable, or lacks a column that `source.columns` names.
    """
    rows = _read_dataset(source, split) if source.dataset else _read_path(source, split)
    if rows is None:
        return None
    if not rows:
        raise DataError(f"{_describe(source)}: no rows in the {split} data; expected at least one")
    return [_rename(row, source) for row in rows]


def read_file(path: Path) -> list[Row]:
    """Read all rows of a JSON-lines, CSV, TSV or Parquet file.

    Raises:
        DataError: it is missing, of an unknown type, not UTF-8, or a row cannot be read.
    """
    return list(iterate_file(path))


def iterate_file(path: Path) -> Iterator[Row]:
    """Read a file row by row, without holding it in memory.

    Raises:
        DataError: it is missing or of an unknown type; later, as for `read_file`.
    """
    if path.is_dir():
        raise DataError(f"{path}: expected a file, found a folder")
    if not path.is_file():
        nearby = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file.{did_you_mean(str(path), nearby)}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown type '{path.suffix}'; expected one of {', '.join(_READERS)}")
    return reader(path)


def _read_path(source: Source, split: Split) -> list[Row] | None:
    if source.demo is not None:
        folder = files("hyperadapters") / "demo_data" / source.demo
        if not folder.is_dir():
            known = [item.name for item in (files("hyperadapters") / "demo_data").iterdir() if item.is_dir()]
            raise DataError(unknown_name("demo task", source.demo, known))
        return read_file(Path(str(folder / f"{split}.jsonl")))
    if isinstance(source.path, dict):
        return read_file(Path(source.path[split])) if split in source.path else None
    pattern = str(source.path)
    if "{split}" not in pattern:
        return read_file(Path(pattern)) if split == "train" else None
    path = Path(pattern.replace("{split}", split))
    return None if split in source.cut and not path.is_file() else read_file(path)


def _read_dataset(source: Source, split: Split) -> list[Row] | None:
    import datasets

    splits = source.splits or {name: name for name in SPLITS}
    if split not in splits:
        return None
    name = f"data set {source.dataset}" + (f" ({source.subset})" if source.subset else "")
    try:
        table = datasets.load_dataset(source.dataset, source.subset, split=splits[split])
    except ValueError as error:
        if source.splits is None and split != "train" and "split" in str(error):
            return None
        raise DataError(f"{name}: cannot be loaded: {error}") from error
    except Exception as error:  # `datasets` raises many unrelated types; all of them mean that the source is wrong
        raise DataError(f"{name}: cannot be loaded: {type(error).__name__}: {error}") from error
    names = {
        column: feature.names for column, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    return [
        Row({**values, **_named(values, names)}, f"{name}, {splits[split]} row {number}")
        for number, values in enumerate(table, start=1)
    ]


def _named(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, str | None]:
    """Class numbers as names; a negative number or null marks a row without a label."""
    numbers = {column: -1 if values[column] is None else values[column] for column in names}
    return {column: known[numbers[column]] if numbers[column] >= 0 else None for column, known in names.items()}


def _rename(row: Row, source: Source) -> Row:
    values = dict(row.values)
    for name, column in source.columns.items():
        if column not in row.values:
            raise DataError(
                f"{row.place}: no column '{column}' (for {name}).{did_you_mean(column, row.values)} "
                f"Found: {', '.join(row.values)}"
            )
        values[name] = row.values[column]
    if source.label_names is not None:
        label = values.get("label")
        key = str(label).lower() if isinstance(label, bool) else str(label)
        values["label"] = source.label_names.get(key, label)
    return Row(values, row.place)


def _describe(source: Source) -> str:
    return str(source.path or source.dataset or source.demo)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, as they are."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_undecodable_line(path)}: not UTF-8: {error.reason}; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError:
                return number
    return 1


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: expected one JSON object a line: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected a JSON object, found {type(values).__name__}")
        yield Row(values, place)


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) != len(header):
            raise DataError(f"{path}, line 1: column names must be different from each other, found {header}")
        for cells in lines:
            place = f"{path}, line {lines.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{place}: expected {len(header)} cells ({', '.join(header)}), found {len(cells)}")
            yield Row(dict(zip(header, cells, strict=True)), place)
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}") from None


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, delimiter="\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (values for batch in file.iter_batches(PARQUET_ROWS) for values in batch.to_pylist())
            for number, values in enumerate(rows, start=1):
                yield Row(values, f"{path}, row {number}")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
