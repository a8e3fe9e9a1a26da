"""The files of a task store.

    task_store.json  what the tasks belong to, and how many values of each of the other files are valid
    tasks.bin        for each task, the place of its record and of its keys, its threshold and checksums
    names.bin        for each task, the hash of its name
    keys.bin         vectors to which inputs are compared in routing: one or several for each task
    owners.bin       for each key, its task, and whether the task reads pairs of texts
    records.bin      the definition and the tensors of each task, see `task_records`
    removed.bin      numbers of the tasks that were removed or replaced

All numbers are little-endian. Values are only appended. Replacing the JSON file is the last step of a change, so that a
reader sees either the old or the new state. What a change that was killed has left behind the valid values is ignored,
and is overwritten by the next change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from hyperadapters._version import __version__
from hyperadapters.checkpoints.columns import Array, write_column
from hyperadapters.checkpoints.format import BackboneReference
from hyperadapters.config import Lengths, ModelConfig, StrictModel, parse
from hyperadapters.errors import CheckpointError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import new_folder, write_atomically
from hyperadapters.utils.reading import is_file, leads_outside, parse_json

STORE_FILE = "task_store.json"
FORMAT_VERSION = 1

TASK = np.dtype(
    [
        ("start", "<u8"),
        ("size", "<u4"),
        ("first_key", "<u8"),
        ("num_keys", "<u4"),
        ("threshold", "<f8"),
        ("record_sha256", "V16"),
        ("keys_crc32", "<u4"),
        ("owners_crc32", "<u4"),
        ("crc32", "<u4"),
    ]
)
OWNER = np.dtype([("task", "<u4"), ("is_pair", "<u4"), ("texts", "<f4")])
NUMBER = np.dtype("<u4")
NAME = np.dtype("<u8")
OF_TASKS = (
    "method.prototypes.",
    "method.thresholds",
    "method.adapter_scales",
    "method.densities.means",
    "method.densities.counts",
    "method.own_adapters.",
    "heads.",
)
"""Beginnings of the names of tensors that belong to single tasks."""


class StoreConfig(StrictModel):
    """Contents of the JSON file, apart from its checksum.

    Attributes:
        routing: What the keys are made from, as `ModelConfig.routing`.
        key_size: Number of elements of a key.
        tasks: Number of tasks, including those that were removed.
        keys: Number of keys.
        removed: Number of removed tasks.
        record_bytes: Size of all records.
        most_keys: Largest number of keys of a task.
    """

    format: Literal["hyperadapters task store"] = "hyperadapters task store"
    format_version: int = FORMAT_VERSION
    library_version: str = __version__
    backbone: BackboneReference
    model: ModelConfig
    lengths: Lengths
    shared_sha256: str
    routing: Literal["prototypes", "densities"]
    key_size: PositiveInt
    tasks: NonNegativeInt = 0
    keys: NonNegativeInt = 0
    removed: NonNegativeInt = 0
    record_bytes: NonNegativeInt = 0
    most_keys: NonNegativeInt = 1


def columns_of(config: StoreConfig) -> list[tuple[str, np.dtype[Any], int]]:
    """Return the name of each file of values, the type of a value, and the number of valid values.

    Args:
        config: Contents of the JSON file.
    """
    return [
        ("tasks.bin", TASK, config.tasks),
        ("names.bin", NAME, config.tasks),
        ("keys.bin", np.dtype(("<f4", (config.key_size,))), config.keys),
        ("owners.bin", OWNER, config.keys),
        ("records.bin", np.dtype(np.uint8), config.record_bytes),
        ("removed.bin", NUMBER, config.removed),
    ]


def create_files(folder: str | Path, config: StoreConfig) -> None:
    """Create the files of a store without tasks.

    Args:
        folder: Folder to create.
        config: What the tasks will belong to.

    Raises:
        OutputError: If the folder exists and is not empty, or cannot be written.
    """
    with new_folder(folder) as new:
        for name, _, _ in columns_of(config):
            (new / name).touch()
        _write_config(new, config)


def append_values(folder: Path, config: StoreConfig, values: Mapping[str, Array], changed: Mapping[str, int]) -> None:
    """Write values behind those of each file, and then the JSON file, which makes them valid.

    Args:
        folder: Folder of the store, which is locked.
        config: Present contents of the JSON file.
        values: New values by the name of the file.
        changed: Fields of the JSON file that change.

    Raises:
        CheckpointError: If a file is missing.
        OutputError: If a file cannot be written. The store has not changed then.
    """
    for name, dtype, count in columns_of(config):
        if len(values.get(name, ())):
            write_column(folder / name, count * dtype.itemsize, values[name].tobytes())
    _write_config(folder, config.model_copy(update={**changed, "library_version": __version__}))


def _write_config(folder: Path, config: StoreConfig) -> None:
    values = config.model_dump(mode="json")
    text = json.dumps({**values, "sha256": _digest_of(values)}, indent=2) + "\n"
    write_atomically(folder / STORE_FILE, text.encode())


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_store(folder: Path) -> bool:
    """Return whether a folder contains a task store.

    Args:
        folder: The folder.
    """
    return is_file(folder / STORE_FILE)


def read_config(folder: Path) -> StoreConfig:
    """Read the JSON file of a store.

    Args:
        folder: Folder of the store.

    Returns:
        Contents of the file.

    Raises:
        CheckpointError: If there is no store, its JSON file is damaged, or it has a newer format.
    """
    path = folder / STORE_FILE
    if leads_outside(folder, STORE_FILE) or not is_file(path):
        raise CheckpointError(f"{folder}: no task store here; expected a file {STORE_FILE} in it")
    try:
        values: Any = parse_json(path.read_bytes())
        found = values.pop("sha256")
        version = values["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, str(error)) from None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {version}, this library ({__version__}) reads up to {FORMAT_VERSION}; upgrade it"
        )
    if found != _digest_of(values):
        raise damaged(path, "it has another checksum")
    return parse(StoreConfig, values, CheckpointError, str(path))


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the error for a damaged file.

    Args:
        path: The file.
        reason: What was found.
    """
    return CheckpointError(f"{path}: {reason}; the file is damaged: restore it from a copy")


def record_digest(record: bytes) -> bytes:
    """Return the checksum of a record.

    Args:
        record: The record.
    """
    return hashlib.sha256(record).digest()[: TASK["record_sha256"].itemsize]


def name_hash(name: str) -> int:
    """Return the hash of a task's name.

    Args:
        name: Name of the task.
    """
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[: NAME.itemsize], "little")


def shared_digest(model: HyperAdapterModel) -> str:
    """Return a digest of the trained parts of a model that all its tasks share.

    Args:
        model: The model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.adapter_state_dict().items()):
        if not name.startswith(OF_TASKS):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
