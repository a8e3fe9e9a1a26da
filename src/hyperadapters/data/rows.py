"""Tables, arrays and other collections as rows; scalars of pandas, NumPy and Arrow as plain Python values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from hyperadapters.errors import DataError


def iterate_rows(inputs: Any, what: str = "inputs") -> Iterator[Any]:
    """Return an iterator over the rows of a collection.

    DataFrames of pandas and polars, tables of Arrow and data sets give a mapping for each row. Two-dimensional arrays
    of two columns give pairs. Everything else that can be iterated gives its items.

    Raises:
        DataError: `inputs` is one item instead of a collection, or a collection without rows or without an order.
    """
    name = type(inputs).__name__
    library = type(inputs).__module__.partition(".")[0]
    if isinstance(inputs, (str, bytes, bytearray, Mapping)) or name == "Example":
        advice = "pass one of its splits" if name.endswith("DatasetDict") else "put it in a list"
        raise DataError(f"{what}: expected a list or another iterable of inputs, found {name}: {advice}")
    if isinstance(inputs, (set, frozenset)) or hasattr(inputs, "read") or library == "torch":
        raise DataError(f"{what}: expected a list, a DataFrame or another collection of rows in order, found {name}")
    if isinstance(inputs, np.ndarray):
        return _of_array(inputs, what)
    if library == "pandas" and hasattr(inputs, "itertuples"):
        columns = [str(column) for column in inputs.columns]
        if twice := sorted(column for column, count in Counter(columns).items() if count > 1):
            raise DataError(
                f"{what}: expected columns of different names, found '{twice[0]}' twice; rename one of them"
            )
        return (dict(zip(columns, row, strict=True)) for row in inputs.itertuples(index=False, name=None))
    if library == "polars" and hasattr(inputs, "iter_rows"):
        rows: Iterator[Any] = inputs.iter_rows(named=True)
        return rows
    if library == "pyarrow" and hasattr(inputs, "to_pylist"):
        return iter(inputs.to_pylist())
    if not isinstance(inputs, Iterable) or (library == "pandas" and not hasattr(inputs, "tolist")):
        raise DataError(f"{what}: expected a list, a DataFrame or another iterable of rows, found {name}")
    return iter(inputs)


def _of_array(array: np.ndarray[Any, Any], what: str) -> Iterator[Any]:
    if array.ndim == 1:
        return iter(array.tolist())
    if array.ndim == 2 and array.shape[1] == 2:
        return (tuple(row) for row in array.tolist())
    raise DataError(f"{what}: expected an array of shape [rows] or [rows, 2], found {list(array.shape)}")


def plain(value: Any) -> Any:
    """Return a scalar of NumPy, Arrow or pandas as a plain Python value, and a missing value as None."""
    if type(value).__module__.partition(".")[0] == "pyarrow" and hasattr(value, "as_py"):
        value = value.as_py()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        value = int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def is_absent(value: Any) -> bool:
    """Return whether a plain value marks an empty cell: None, the empty text or NaN."""
    return value is None or value == "" or (isinstance(value, float) and value != value)
