"""Reading rows from JSON-lines, CSV, TSV and Parquet files, data sets of the Hub, and the demo data.

JSON-lines, CSV and TSV files are read line by line with the standard library, because error messages contain the line.
The other sources are read with pyarrow and `datasets`.
"""

from __future__ import annotations

import csv
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hyperadapters.config import SPLITS, Source, Split, normalize_label
from hyperadapters.data.bad_rows import BadRows
from hyperadapters.data.columns import is_taken, rename, used_columns
from hyperadapters.data.rows import is_absent, plain
from hyperadapters.data.stored_rows import Codec, collect
from hyperadapters.errors import DataError, did_you_mean, shown, unknown_name
from hyperadapters.utils.reading import is_file, is_folder, parse_json
from hyperadapters.utils.texts import counted

logger = logging.getLogger(__name__)

MAX_CELL = 2**31 - 1
"""Maximum number of characters of a CSV cell, the largest value of a C long on every platform."""
MAX_DATASET_COLUMNS = 10_000
"""Number of columns of a CSV file read by `datasets` whose cells are kept as strings."""
INDEX = re.compile("-?[0-9]{1,9}")
"""An index of a class, or a negative number where there is no label."""
BLOCK = 8192
"""Bytes of lines that are decoded together, so that a wrong encoding is reported before an unreadable row."""
FIELDS = ("text", "text_pair", "label")
"""Columns of a row that are read, after those of its source have been renamed."""
PARQUET_ROWS = 1024
"""Number of rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source.

    Attributes:
        values: Values by the names of the columns.
        place: Location of the row, for messages, such as "train.csv, line 3".
    """

    values: dict[str, Any]
    place: str


def _stored_values(row: Row) -> list[Any]:
    """Return the values of a row and its place; of columns that are not read, only the names are kept."""
    return [{str(name): _stored(row.values[name]) if name in FIELDS else None for name in row.values}, row.place]


def _stored(value: Any) -> Any:
    """Return a cell in a form that JSON can represent, or raise TypeError."""
    value = plain(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_stored(item) for item in value]
    if hasattr(value, "tolist"):  # an array of labels
        return _stored(value.tolist())
    if type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"JSON cannot represent {type(value).__name__}")
    return value


ROWS = Codec[Row](encode=_stored_values, decode=lambda found: Row(*found))


def read_splits(source: Source, bad_rows: BadRows | None = None) -> dict[Split, Sequence[Row]]:
    """Read the rows of all splits that a source has.

    Args:
        source: Origin of the rows.
        bad_rows: What is done with bad rows. Default: they are errors.

    Returns:
        Rows of each split, whose columns have been renamed to text, text_pair and label.

    Raises:
        DataError: If a file is missing, empty or unreadable, or does not have a column in `source.columns` or
            `source.where`, or a split has no row that is taken, or a key of `source.label_names` is not a label in any
            split.
    """
    names = {normalize_label(key): name for key, name in (source.label_names or {}).items()}
    labels: set[str] = set()

    def named(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if names:
                labels.update(map(_label_key, _labels_of(row)))
            yield _name_label(row, names)

    found: dict[Split, Sequence[Row]] = {}
    for split in SPLITS:
        rows = _read_dataset(source, split) if source.dataset else _read_path(source, split, bad_rows)
        if rows is None:
            continue
        found[split] = collect(named(_taken(rows, source, split)), ROWS)
        if not found[split]:
            wanted = "".join(f" with {column} '{text}'" for column, text in source.where.items())
            note = "" if bad_rows is None else bad_rows.note()
            where = f"{_describe(source)}: expected at least one row{wanted} in the {split} data"
            raise DataError(f"{where}, found none{note}")
    if found and (unused := [key for key in source.label_names or {} if normalize_label(key) not in labels]):
        raise DataError(f"{_describe(source)}: label_names: " + unknown_name("label", unused[0], labels))
    return found


def read_file(path: Path, delimiter: str | None = None, bad_rows: BadRows | None = None) -> list[Row]:
    """Read all rows of a JSON-lines, CSV, TSV or Parquet file.

    Args:
        path: File to read.
        delimiter: Delimiter of a CSV or TSV file. Default: a comma for CSV and a tab for TSV.
        bad_rows: What is done with bad rows. Default: they are errors.

    Returns:
        The rows.

    Raises:
        DataError: If the file is missing, has an unknown type, is not UTF-8, or a row is invalid.
    """
    return list(iterate_file(path, delimiter, bad_rows))


def iterate_standard_input(bad_rows: BadRows | None = None) -> Iterator[Row]:
    """Read JSON-lines from standard input.

    Args:
        bad_rows: What is done with bad rows. Default: they are errors.

    Yields:
        The rows, each as soon as its line has been read.

    Raises:
        DataError: If a line is not UTF-8 or not a JSON object.
    """
    place = "standard input"
    try:
        yield from _parse_jsonl(_decode(sys.stdin.buffer, place), place, bad_rows or BadRows())
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error}") from None


def iterate_file(path: Path, delimiter: str | None = None, bad_rows: BadRows | None = None) -> Iterator[Row]:
    """Iterate over the rows of a file without loading all of it into memory.

    Args:
        path: JSON-lines, CSV, TSV or Parquet file.
        delimiter: Delimiter of a CSV or TSV file. Default: a comma for CSV and a tab for TSV.
        bad_rows: What is done with bad rows. Default: they are errors.

    Raises:
        DataError: If the file is missing or has an unknown type, or, during the iteration, a row is invalid.
    """
    if is_folder(path):
        raise DataError(f"{path}: expected a file, found a folder")
    if not is_file(path):
        nearby = [str(other) for other in path.parent.glob("*")] if is_folder(path.parent) else []
        raise DataError(f"{path}: no such file.{did_you_mean(str(path), nearby)}")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(f"{path}: unknown type '{path.suffix}'; expected one of {', '.join(ENDINGS)}")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise DataError(f"delimiter: expected one character, not a quotation mark or a line end; found {delimiter!r}")
    bad_rows = bad_rows or BadRows()
    if ending in DELIMITERS:
        return _read_table(path, delimiter or DELIMITERS[ending], delimiter is None, bad_rows)
    if delimiter is not None:
        raise DataError(f"{path}: a delimiter is only valid for CSV and TSV files; remove it")
    return _read_parquet(path) if ending == ".parquet" else _parse_jsonl(_lines(path), str(path), bad_rows)


def _taken(rows: Iterable[Row], source: Source, split: Split) -> Iterator[Row]:
    """Return the rows that a source takes, with renamed columns and the names of classes."""
    num_unlabelled = 0
    for row in rows:
        if not is_taken(row.values, source, row.place):
            continue
        found = Row(rename(row.values, source, row.place), row.place)
        if source.class_names and "label" in found.values:
            found = _name_class(found, source)
        if source.skip_unlabelled and is_absent(found.values.get("label")):
            num_unlabelled += 1
            continue
        yield found
    if source.skip_unlabelled:
        logger.info(f"{_describe(source)}: {num_unlabelled} {split} rows have no label and are left out")


def _read_path(source: Source, split: Split, bad_rows: BadRows | None) -> Iterator[Row] | None:
    if source.demo is not None:
        folder = files("hyperadapters") / "demo_data" / source.demo
        if not folder.is_dir():
            known = [item.name for item in (files("hyperadapters") / "demo_data").iterdir() if item.is_dir()]
            raise DataError(unknown_name("demo task", source.demo, known))
        return iterate_file(Path(str(folder / f"{split}.jsonl")))
    if isinstance(source.path, dict):
        return iterate_file(Path(source.path[split]), source.delimiter, bad_rows) if split in source.path else None
    pattern = str(source.path)
    if "{split}" not in pattern:
        return iterate_file(Path(pattern), source.delimiter, bad_rows) if split == "train" else None
    path = Path(pattern.replace("{split}", split))
    is_missing = split in source.held_out and not is_file(path)
    return None if is_missing else iterate_file(path, source.delimiter, bad_rows)


def _read_dataset(source: Source, split: Split) -> Iterator[Row] | None:
    import datasets

    splits = source.splits or {name: name for name in SPLITS}
    if split not in splits:
        return None
    name = f"data set {source.dataset}" + (f" ({source.subset})" if source.subset else "")
    try:
        options = _as_text(datasets.load_dataset_builder(source.dataset, source.subset))
        table = datasets.load_dataset(source.dataset, source.subset, split=splits[split], **options)
    except ValueError as error:
        if source.splits is None and split != "train" and "split" in str(error):
            return None
        raise DataError(f"{name}: cannot be loaded: {error}") from error
    except Exception as error:  # `datasets` raises many unrelated types, all of which mean that the source is invalid
        raise DataError(f"{name}: cannot be loaded: {type(error).__name__}: {error}") from error
    table = table.select_columns(used_columns(source, table.column_names))  # the others may be much larger
    names = class_names(table)
    return (
        Row(name_classes(values, names), f"{name}, {splits[split]} row {number}")
        for number, values in enumerate(table, start=1)
    )


def _as_text(builder: Any) -> dict[str, Any]:
    """Return options with which `datasets` keeps the cells of CSV files as strings, so that 001 does not become 1."""
    from datasets.packaged_modules.csv.csv import CsvConfig

    if not isinstance(builder.config, CsvConfig) or builder.info.features is not None:
        return {}
    return {"converters": dict.fromkeys(range(MAX_DATASET_COLUMNS), str), "na_filter": False}


def class_names(data: Any) -> dict[str, list[str]]:
    """Return the names of classes for each column of a `datasets.Dataset` with class indices or lists of them.

    Args:
        data: Data of any type. There are no such columns unless it is a data set of the library `datasets`.
    """
    if type(data).__module__.partition(".")[0] != "datasets":
        return {}
    import datasets

    features = (getattr(data, "features", None) or {}).items()
    found = {column: getattr(feature, "feature", feature) for column, feature in features}  # that of a list's items
    return {column: feature.names for column, feature in found.items() if isinstance(feature, datasets.ClassLabel)}


def name_classes(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Return the values of a row in which class indices are replaced by names.

    Args:
        values: Values by column: class indices, or lists of them. A negative index or None marks a missing label, which
            becomes None.
        names: Names of classes by column.
    """

    def named(value: Any, known: list[str]) -> Any:
        if isinstance(value, (list, tuple)):
            return [named(item, known) for item in value]
        return None if value is None or value < 0 else known[value]

    return {**values, **{column: named(values[column], known) for column, known in names.items()}}


def _name_class(row: Row, source: Source) -> Row:
    """Return a row with the name of a class in the place of its index, and None for a negative index."""

    def named(label: Any) -> Any:
        if isinstance(label, list):
            return [named(item) for item in label]
        is_name = source.dataset is not None and isinstance(label, str)  # a class may be named by a number
        index = _label_key(label)
        if is_name or not INDEX.fullmatch(index) or int(index) >= len(source.class_names):
            return label
        return None if int(index) < 0 else source.class_names[int(index)]

    return Row({**row.values, "label": named(row.values.get("label"))}, row.place)


def _name_label(row: Row, names: dict[str, str]) -> Row:
    if not names:
        return row
    found = [names.get(_label_key(label), label) for label in _labels_of(row)]
    return Row({**row.values, "label": found if isinstance(row.values.get("label"), list) else found[0]}, row.place)


def _labels_of(row: Row) -> list[Any]:
    """Return the labels of a row, which are several if its column contains a list."""
    label = row.values.get("label")
    return label if isinstance(label, list) else [label]


def _label_key(label: object) -> str:
    """Return a label as a normalised string; a whole number may be a float, as in a Parquet column with nulls."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, bool):
        return str(label).lower()
    return normalize_label(label if isinstance(label, str) else shown(label))


def _describe(source: Source) -> str:
    return str(source.path or source.dataset or source.demo)


def _lines(path: Path) -> Iterator[str]:
    """Return the lines of a file, which end with a line feed; a carriage return is part of the line."""
    try:
        with path.open("rb") as file:
            number = 0
            while block := file.readlines(BLOCK):
                yield from list(_decode(block, str(path), number))
                number += len(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _decode(lines: Iterable[bytes], place: str, before: int = 0) -> Iterator[str]:
    for number, line in enumerate(lines, start=before + 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}, line {number}: not UTF-8: {error.reason}; save the file as UTF-8") from None


def _parse_jsonl(lines: Iterable[str], source: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            values = parse_json(
                line, object_pairs_hook=_unique, parse_float=_finite_number, parse_constant=_finite_number
            )
        except ValueError as error:
            bad_rows.add(DataError(f"{place}: expected a JSON object on each line: {error}"))
            continue
        if isinstance(values, dict):
            yield Row(values, place)
        else:
            bad_rows.add(DataError(f"{place}: expected a JSON object, found {type(values).__name__}"))


def _finite_number(text: str) -> float:
    """Read a number of JSON, which has none that is not finite; Python would read NaN, Infinity and 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {text}; write null where a number is missing")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{key}' occurs {count} times in one object; remove all but one")
    return values


def _read_table(path: Path, delimiter: str, sniff: bool, bad_rows: BadRows) -> Iterator[Row]:
    """Read a CSV or TSV file: the first line names the columns.

    A blank line is an empty string if there is one column, and is skipped if there are several.
    """
    csv.field_size_limit(MAX_CELL)
    rows = _tsv_cells(path) if delimiter == "\t" else _csv_cells(path, delimiter)
    start, end, header = next(rows, (1, 1, []))
    _check_header(path, header, delimiter, sniff)
    for start, end, cells in rows:
        if not cells and len(header) != 1:
            continue
        if not header:
            raise DataError(f"{path}, line 1: expected the names of the columns, found a blank line; remove it")
        if len(cells or [""]) != len(header):
            fault = _cells_fault(path, start, end, header, cells)
            is_skipped = bad_rows.skips and start == end  # otherwise it is not known which of its lines are rows
            if not is_skipped:
                raise DataError(fault + _open_mark(path, end, delimiter))
            bad_rows.add(DataError(fault))
            continue
        yield Row(dict(zip(header, cells or [""], strict=True)), f"{path}, line {end}")


def _cells_fault(path: Path, start: int, end: int, header: Sequence[str], cells: Sequence[str]) -> str:
    fault = f"{path}, line {end}: expected {counted(len(header), 'cell')} ({', '.join(header)}), found {len(cells)}"
    if start < end:
        return f"{fault}; the row begins in line {start}, which contains a quotation mark"
    return fault + "; put texts that contain the delimiter into quotation marks" * (len(cells) > len(header))


def _open_mark(path: Path, end: int, delimiter: str) -> str:
    """Return a note for an error in a TSV file: the last line before it with a quotation mark that was read as text."""
    if delimiter != "\t":
        return ""
    before = enumerate(islice(_lines(path), end - 1), start=1)
    opened = [
        number for number, line in before if any(cell[:1] == '"' == _unquote(cell)[:1] for cell in _split_tabs(line))
    ]
    if not opened:
        return ""
    return (
        f'; line {opened[-1]} has a cell that begins with a quotation mark ("), read as text: if its cells are '
        "quoted, put the column names in quotation marks too"
    )


def _check_header(path: Path, header: list[str], delimiter: str, sniff: bool) -> None:
    place = f"{path}, line 1"
    found = next((mark for mark in ";,\t|" if mark in "".join(header)), None)
    if sniff and len(header) == 1 and found is not None:
        raise DataError(
            f"{place}: expected columns delimited by {delimiter!r}, found {header[0]!r}, which seems to be delimited "
            f"by {found!r}; set delimiter: {found!r} in the source of the recipe, or --delimiter on the command line"
        )
    if len(set(header)) != len(header):
        raise DataError(f"{place}: column names must be different from each other, found {header}")
    if "" in header:
        raise DataError(
            f"{place}: column {header.index('') + 1} has no name; name it or remove it (pandas writes its index "
            "without a name unless index=False is passed)"
        )
    if any("\r" in name for name in header):
        raise DataError(f"{place}: found a carriage return in the line; save the file with line feeds as line ends")


Cells = tuple[int, int, list[str]]
"""First line, last line and cells of a row."""


def _csv_cells(path: Path, delimiter: str) -> Iterator[Cells]:
    """Return the rows of a CSV file, whose quoted cells may contain delimiters and line ends (RFC 4180)."""
    taken: list[str] = []

    def taking() -> Iterator[str]:
        for line in _lines(path):
            taken.append(line)
            yield line

    rows = csv.reader(taking(), delimiter=delimiter, strict=True)
    num_columns, warned = 0, False
    while True:
        start = rows.line_num + 1
        taken.clear()
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {start}: {_csv_fault(str(error), start, rows.line_num)}") from None
        if cells is None:
            return
        num_columns = num_columns or len(cells)
        if not warned and len(taken) > 1 and all(line.count(delimiter) == num_columns - 1 for line in taken):
            warned = True
            logger.warning(
                "%s, line %d: a quotation mark opens a cell that ends in line %d; these lines are read as one row. "
                "If each line is a row, double the quotation marks of the text and put the text in quotation marks.",
                path, start, rows.line_num,
            )  # fmt: skip
        yield start, rows.line_num, cells


def _csv_fault(fault: str, start: int, end: int) -> str:
    if "new-line character" in fault:
        return "a carriage return inside the line; put the cell in quotation marks, or end lines with line feeds"
    if "unexpected end" in fault:
        fault = "it is never closed"
    elif end > start:
        fault += f" in line {end}"
    return (
        f'a quotation mark (") opens a cell of the row that begins here, and {fault}; double each quotation mark that '
        "belongs to the text and put the text in quotation marks"
    )


def _tsv_cells(path: Path) -> Iterator[Cells]:
    """Return the rows of a TSV file, in which quotation marks are part of the text unless a CSV writer wrote them.

    If all column names are quoted, the file is read like CSV. Otherwise each line with as many cells as the header is a
    row, and a cell is unquoted only if all quotation marks in it are doubled. A line with another number of cells is
    read like CSV, where quoted cells may contain tabs and line ends.
    """
    lines = _lines(path)
    first = next(lines, "")
    names = _split_tabs(first)
    if all(len(name) > 1 and name[0] == name[-1] == '"' for name in names):
        yield from _csv_cells(path, "\t")
        return
    yield 1, 1, names
    number, warned = 1, False
    for line in lines:
        start = number = number + 1
        cells = _split_tabs(line)
        if cells and len(cells) != len(names) and '"' in line:
            cells, taken = _quoted_row(path, start, chain([line], lines))
            number = start + taken - 1
        elif '"' in line:
            kept, cells = cells, [_unquote(cell) for cell in cells]
            unclear = any(cell[:1] == '"' and cell == text for cell, text in zip(kept, cells, strict=True))
            if unclear and not warned:
                warned = True
                logger.warning(
                    "%s, line %d: a cell begins with a quotation mark, which is read as part of the text: a TSV file "
                    "has no quoting. If its cells are quoted, put the column names in quotation marks too.",
                    path, start,
                )  # fmt: skip
        yield start, number, cells


def _quoted_row(path: Path, start: int, lines: Iterator[str]) -> tuple[list[str], int]:
    """Return a row of a TSV file with quoted cells, and its number of lines."""
    row = csv.reader(lines, delimiter="\t", strict=True)
    try:
        return next(row), row.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: {_csv_fault(str(error), start, start + row.line_num - 1)}") from None


def _split_tabs(line: str) -> list[str]:
    text = line.removesuffix("\n").removesuffix("\r")
    return text.split("\t") if text else []


def _unquote(cell: str) -> str:
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise DataError(f"{path}: column names must be different from each other, found {names}")
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS):
                for values in _batch_rows(batch, path, number):
                    number += 1
                    yield Row(values, f"{path}, row {number}")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: the name of a column
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _batch_rows(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError):
        for column, name in zip(batch.columns, batch.schema.names, strict=True):
            for number, cell in enumerate(column, start=before + 1):
                try:
                    cell.as_py()
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, row {number}: '{name}' is not UTF-8: {error.reason}") from None
                except (ValueError, OverflowError) as error:  # a date that Python cannot represent
                    raise DataError(f"{path}, row {number}: '{name}' cannot be read: {error}") from None
        raise
    return rows


DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".jsonl", *DELIMITERS, ".parquet")
