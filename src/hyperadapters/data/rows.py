"""Conversion of tables, arrays and other collections to rows, and of their scalars to plain Python values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from hyperadapters.errors import DataError

MAX_WHOLE = 10**76
"""Limit of whole numbers of decimal type that are read as integers, the largest that a column of decimals can hold."""


def iterate_rows(inputs: Any, what: str = "inputs") -> Iterator[Any]:
    """Return an iterator over the rows of a collection.

    The rows of a DataFrame of pandas or polars, of an Arrow table and of a data set are mappings. The rows of a
    two-dimensional array with two columns are pairs. The rows of any other iterable, and of a map-style dataset of
    PyTorch, are its items.

    Args:
        inputs: Collection of rows.
        what: Name of the argument, for the message.

    Raises:
        DataError: If `inputs` is a single item, or a collection that is unordered or does not consist of rows.
    """
    name = type(inputs).__name__
    libraries = {parent.__module__.partition(".")[0] for parent in type(inputs).__mro__}
    if isinstance(inputs, (str, bytes, bytearray, memoryview, Mapping)) or name == "Example":
        advice = "pass one of its splits" if name.endswith("DatasetDict") else "put it in a list"
        raise DataError(f"{what}: expected a list or another iterable of inputs, found {name}; {advice}")
    if isinstance(inputs, (set, frozenset)) or hasattr(inputs, "read") or name in ("Tensor", "Parameter"):
        raise DataError(f"{what}: expected a list, a DataFrame or another collection of rows in order, found {name}")
    if isinstance(inputs, np.ndarray):
        return _of_array(inputs, what)
    if "pandas" in libraries and hasattr(inputs, "itertuples"):
        columns = _different([str(column) for column in inputs.columns], what)
        return (dict(zip(columns, row, strict=True)) for row in inputs.itertuples(index=False, name=None))
    if "pandas" in libraries and "text" in getattr(inputs, "index", ()):
        raise DataError(f"{what}: expected rows, found a {name} that is one row of a DataFrame; put it in a list")
    if "polars" in libraries and hasattr(inputs, "iter_rows"):
        rows: Iterator[Any] = inputs.iter_rows(named=True)
        return rows
    if "pyarrow" in libraries and hasattr(inputs, "to_pylist"):
        _different(list(getattr(inputs, "column_names", ())), what)
        return iter(inputs.to_pylist())
    if not isinstance(inputs, Iterable) and hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):
        return (inputs[index] for index in range(len(inputs)))  # `iter` requires an IndexError at the end
    if not isinstance(inputs, Iterable) or ("pandas" in libraries and not hasattr(inputs, "tolist")):
        raise DataError(f"{what}: expected a list, a DataFrame or another iterable of rows, found {name}")
    return iter(inputs)


def _different(columns: list[str], what: str) -> list[str]:
    """Check that the names of columns are different, because a row is a mapping from names to values."""
    if len(set(columns)) < len(columns):
        raise DataError(f"{what}: column names must be different from each other, found {', '.join(columns)}")
    return columns


def _of_array(array: np.ndarray[Any, Any], what: str) -> Iterator[Any]:
    if array.ndim == 1 and array.dtype.names:
        return (dict(zip(array.dtype.names, row, strict=True)) for row in array.tolist())
    if array.ndim == 1:
        return iter(array.tolist())
    if array.ndim == 2 and array.shape[1] == 2:
        return (tuple(row) for row in array.tolist())
    raise DataError(f"{what}: expected an array of shape [rows] or [rows, 2], found {list(array.shape)}")


def by_column(row: Any) -> Any:
    """Return a row with named values as a mapping, and any other row unchanged.

    Args:
        row: Row of any kind. Those with named values are Series of pandas, named tuples, records of NumPy and structs
            of Arrow.
    """
    libraries = {parent.__module__.partition(".")[0] for parent in type(row).__mro__}
    if isinstance(row, tuple) and hasattr(row, "_asdict"):
        return row._asdict()
    if isinstance(row, np.void) and row.dtype.names:
        return dict(zip(row.dtype.names, row.item(), strict=True))
    if "pandas" in libraries and all(isinstance(name, str) for name in getattr(row, "index", [None])):
        return dict(zip(_different(list(row.index), "row"), row, strict=True))
    return row.as_py() if "pyarrow" in libraries and hasattr(row, "as_py") else row


def plain(value: Any) -> Any:
    """Return a scalar of NumPy, Arrow, pandas or PyTorch as a plain Python value, and a missing value as None.

    Args:
        value: Any value. Values that are not such scalars are returned unchanged.
    """
    if type(value).__module__.partition(".")[0] == "pyarrow" and hasattr(value, "as_py"):
        value = value.as_py()
    is_scalar_tensor = type(value).__name__ == "Tensor" and getattr(value, "ndim", None) == 0
    if isinstance(value, np.generic) or is_scalar_tensor:
        value = value.item()
    if isinstance(value, Decimal):
        is_whole = value.is_finite() and abs(value) < MAX_WHOLE and value == value.to_integral_value()
        value = math.nan if value.is_nan() else int(value) if is_whole else float(value)
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def is_absent(value: Any) -> bool:
    """Return whether a plain value represents an empty cell, which is None, an empty string or NaN.

    Args:
        value: Plain Python value.
    """
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and value != value)
