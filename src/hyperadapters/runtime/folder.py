"""The folder of an exported runtime: its format, and the reading of a folder that may be damaged or hostile.

    runtime.json        format, settings, tasks, and the size and SHA-256 of each other file
    lower.onnx          the layers below the adapters
    upper.onnx          the layers with adapters, whose weights are inputs of the graph
    tasks.safetensors   the arrays of all tasks: adapters, heads, and what routing compares texts to
    tokenizer.json      the tokenizer with its truncation

The names of the files are constants, so that no path is read from the folder. Nothing is unpickled or uncompressed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyperadapters.errors import CheckpointError, shown
from hyperadapters.utils.reading import is_file, leads_outside, parse_json

Array = np.ndarray[Any, Any]

FORMAT_VERSION = 1
SETTINGS_FILE = "runtime.json"
LOWER_FILE, UPPER_FILE = "lower.onnx", "upper.onnx"
ARRAYS_FILE, TOKENIZER_FILE = "tasks.safetensors", "tokenizer.json"
FILES = (LOWER_FILE, UPPER_FILE, ARRAYS_FILE, TOKENIZER_FILE)
MAX_JSON_BYTES = 16 * 2**20
"""Maximum size of `runtime.json`, and of the header of the arrays."""
MAX_TOKEN_ID = 2**31
ROUTINGS = ("densities", "prototypes")
KINDS = ("classification", "multi-label", "regression")


@dataclass(frozen=True)
class RuntimeTask:
    """A task of a runtime.

    Attributes:
        name: Name of the task.
        kind: One of `KINDS`.
        labels: Names of the labels; none for a regression.
        is_pair: Whether the task reads pairs of texts.
        target_mean: Mean that is added to the output of the head; 0 for tasks with labels.
        target_std: Factor of the output of the head; 1 for tasks with labels.
        thresholds: Probability above which each label of a multi-label task is an answer; none for other tasks.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    is_pair: bool
    target_mean: float
    target_std: float
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What `runtime.json` says about the model.

    Attributes:
        routing: What the task of an input is found by, one of `ROUTINGS`; None if every input needs a task.
        separates_texts: Whether each text of a pair is a sequence of its own, and heads compare the two.
        padding_id: Token id of padding.
        special_ids: Ids of the special tokens. An input of which all tokens are special contains no words.
        tasks: The tasks.
    """

    routing: str | None
    separates_texts: bool
    padding_id: int
    special_ids: tuple[int, ...]
    tasks: tuple[RuntimeTask, ...]


def read_settings(folder: Path) -> tuple[Settings, Mapping[str, Any]]:
    """Read `runtime.json`.

    Args:
        folder: Folder of the runtime.

    Returns:
        The settings, and the size and SHA-256 of each other file by its name.

    Raises:
        CheckpointError: If the file is missing, too large, damaged or of an unknown format.
    """
    path = folder / SETTINGS_FILE
    if not is_file(path) or leads_outside(folder, SETTINGS_FILE):
        raise CheckpointError(
            f"{folder}: expected a folder with {SETTINGS_FILE}, found none; write one with: hyperadapters export RUN "
            "--format runtime"
        )
    data = _read_file(path, MAX_JSON_BYTES)
    try:
        values = parse_json(data)
    except ValueError as error:
        raise _damaged(path, f"expected JSON, {error}") from None
    if not isinstance(values, dict):
        raise _damaged(path, f"expected an object, found {shown(values)}")
    if (version := values.get("format")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format {FORMAT_VERSION}, found {shown(version)}; export the model again with this "
            "version of hyperadapters, or install the version that wrote the folder"
        )
    tasks = tuple(_task(path, value) for value in _field(path, values, "tasks", list))
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise _damaged(path, "tasks: expected at least one task, each with a name of its own")
    routing = values.get("routing")
    if routing is not None and routing not in ROUTINGS:
        raise _damaged(path, f"routing: expected one of {', '.join(ROUTINGS)} or null, found {shown(routing)}")
    if not 0 <= _field(path, values, "padding_id", int) < MAX_TOKEN_ID:
        raise _damaged(path, f"padding_id: expected a token id, found {shown(values['padding_id'])}")
    settings = Settings(
        routing,
        _field(path, values, "separates_texts", bool),
        _field(path, values, "padding_id", int),
        tuple(_items(path, values, "special_ids", int)),
        tasks,
    )
    return settings, _field(path, values, "files", dict)


def read_checked(folder: Path, name: str, files: Mapping[str, Any]) -> bytes:
    """Read a file of the folder and compare it with its size and SHA-256.

    Args:
        folder: Folder of the runtime.
        name: Name of the file, one of `FILES`.
        files: Size and SHA-256 of each file, as returned by `read_settings`.

    Returns:
        Contents of the file.

    Raises:
        CheckpointError: If the file is missing, leads out of the folder, or differs from what is expected.
    """
    path, where = folder / name, folder / SETTINGS_FILE
    expected = _field(where, files, name, dict)
    size, digest = _field(where, expected, "bytes", int), _field(where, expected, "sha256", str)
    if leads_outside(folder, name):
        raise CheckpointError(f"{path}: expected a file in the folder, found a link that leads out of it; remove it")
    if not is_file(path):
        raise _damaged(path, "expected a file, found none")
    data = _read_file(path, size)
    if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
        raise _damaged(path, f"expected {size} bytes with the SHA-256 of {SETTINGS_FILE}, found others")
    return data


def read_arrays(path: Path, data: bytes) -> dict[str, Array]:
    """Read the arrays of a safetensors file, all of them in float32, without a copy.

    Args:
        path: Path of the file, for messages.
        data: Contents of the file.

    Returns:
        Arrays by name, which cannot be written to.

    Raises:
        CheckpointError: If the file is damaged.
    """
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if len(data) < 8 or length > MAX_JSON_BYTES or start > len(data):
        raise _damaged(path, f"expected a header of at most {MAX_JSON_BYTES} bytes, found {length}")
    try:
        header = parse_json(data[8:start])
    except ValueError as error:
        raise _damaged(path, f"expected a header in JSON, {error}") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"expected an object as header, found {shown(header)}")
    header.pop("__metadata__", None)
    return {name: _array(path, name, entry, memoryview(data)[start:]) for name, entry in header.items()}


def _array(path: Path, name: str, entry: Any, data: memoryview) -> Array:
    if not isinstance(entry, dict) or entry.get("dtype") != "F32":
        raise _damaged(path, f"'{name}': expected an array in float32, found {shown(entry)}")
    shape, ends = (_items(path, entry, key, int) for key in ("shape", "data_offsets"))
    if min(shape, default=0) < 0 or len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= len(data):
        raise _damaged(path, f"'{name}': expected a shape and offsets in the file, found {shape} and {ends}")
    if ends[1] - ends[0] != 4 * math.prod(shape):
        raise _damaged(path, f"'{name}': expected {4 * math.prod(shape)} bytes for {shape}, found {ends}")
    return np.frombuffer(data[ends[0] : ends[1]], dtype="<f4").reshape(shape)


def check_shapes(path: Path, arrays: Mapping[str, Array], expected: Mapping[str, tuple[int | None, ...]]) -> None:
    """Check that all arrays are there, and no others.

    Args:
        path: Path of the file, for messages.
        arrays: Arrays by name.
        expected: Expected shapes by name, with None for any size.

    Raises:
        CheckpointError: If an array is missing, unknown, or has another shape.
    """
    if odd := sorted(arrays.keys() ^ expected.keys()):
        what = "an unknown array" if odd[0] in arrays else "no array"
        raise _damaged(path, f"expected the arrays {', '.join(sorted(expected))}, found {what} '{odd[0]}'")
    for name, shape in expected.items():
        found = arrays[name].shape
        fits = len(found) == len(shape) and all(want in (None, size) for want, size in zip(shape, found, strict=True))
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise _damaged(path, f"'{name}': expected shape [{sizes}], found {list(found)}")


def expected_shapes(
    settings: Settings, arrays: Mapping[str, Array], hidden_size: int, num_states: int
) -> dict[str, tuple[int | None, ...]]:
    """Return the expected shapes of the arrays of heads and routing, with None for sizes that are free.

    Args:
        settings: Settings of the runtime.
        arrays: The arrays, from which sizes are taken that several of them share.
        hidden_size: Size d of the hidden states.
        num_states: Number n of layers whose hidden states the densities read.
    """

    def size_of(name: str) -> int | None:
        return arrays[name].shape[-1] if name in arrays and arrays[name].ndim else None

    num_tasks = len(settings.tasks)
    plain = 2 * hidden_size + 1 if settings.separates_texts else hidden_size
    shapes: dict[str, tuple[int | None, ...]] = {}
    for task_id, task in enumerate(settings.tasks):
        weight, outputs = f"heads.{task_id}.weight", len(task.labels) or 1
        is_wide = not settings.separates_texts and size_of(weight) == 2 * hidden_size
        shapes |= {weight: (outputs, 2 * hidden_size if is_wide else plain), f"heads.{task_id}.bias": (outputs,)}
    if settings.routing is not None:
        shapes["thresholds"] = (num_tasks,)
    if settings.routing == "densities":
        features, kept = num_states * hidden_size, size_of("densities.between")
        shapes |= {"densities.center": (features,), "densities.directions": (features, kept)}
        shapes |= {"densities.between": (kept,), "densities.means": (num_tasks, kept)}
        shapes["densities.counts"] = (num_tasks,)
    if settings.routing == "prototypes":
        size, hidden = size_of("prototypes"), size_of("retriever.down.bias")
        shapes |= {"prototypes": (num_tasks, size), "centroids": (num_tasks, None, size)}
        shapes |= {"retriever.down.weight": (hidden, hidden_size), "retriever.down.bias": (hidden,)}
        shapes |= {"retriever.up.weight": (size, hidden), "retriever.up.bias": (size,)}
    return shapes


def _task(path: Path, value: Any) -> RuntimeTask:
    if not isinstance(value, dict):
        raise _damaged(path, f"tasks: expected objects, found {shown(value)}")
    kind = _field(path, value, "kind", str)
    labels = tuple(_items(path, value, "labels", str))
    if kind not in KINDS or bool(labels) != (kind != "regression"):
        raise _damaged(path, f"tasks: expected a kind with labels or a regression, found {shown(value)}")
    thresholds = tuple(_items(path, value, "thresholds", float)) if kind == "multi-label" else ()
    if kind == "multi-label" and len(thresholds) != len(labels):
        raise _damaged(path, f"tasks: expected a threshold for each label, found {shown(value)}")
    mean, std = (_field(path, value, name, float) for name in ("target_mean", "target_std"))
    name, is_pair = _field(path, value, "name", str), _field(path, value, "is_pair", bool)
    return RuntimeTask(name, kind, labels, is_pair, mean, std, thresholds)


def _field(path: Path, values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    # `bool` is a subclass of `int`, but is not a number in JSON.
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise _damaged(path, f"'{name}': expected {kind.__name__}, found {shown(value)}")
    return value


def _items(path: Path, values: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    items: list[Any] = _field(path, values, name, list)
    if not all(type(item) is kind for item in items):
        raise _damaged(path, f"'{name}': expected a list of {kind.__name__}, found {shown(items)}")
    return items


def _read_file(path: Path, most: int) -> bytes:
    """Return the contents of a file, or at most one byte more than is expected."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if len(data) > most:
        raise _damaged(path, f"expected at most {most} bytes, found more")
    return data


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; the file is damaged, so export the model again")
