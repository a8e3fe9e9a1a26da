"""Task stores: folders with any number of tasks of one model, of which only those in use are in memory.

A task store has the tasks only: the backbone and what all tasks share are those of a model, which is loaded from its
checkpoint, and whose fingerprint and digest are compared. `task_store_files` describes the files.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hyperadapters.checkpoints.columns import Array, Column
from hyperadapters.checkpoints.format import BackboneReference
from hyperadapters.checkpoints.task_records import pack, set_states, unpack, unpack_task
from hyperadapters.checkpoints.task_store_files import (
    NAME,
    NUMBER,
    OWNER,
    TASK,
    StoreConfig,
    append_values,
    columns_of,
    create_files,
    damaged,
    name_hash,
    read_config,
    record_digest,
    shared_digest,
)
from hyperadapters.config import Task
from hyperadapters.core import most_similar
from hyperadapters.errors import CheckpointError, TaskError, shown
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.model.tasks import TaskState
from hyperadapters.utils.files import locked, new_folder

BLOCK = 65536
"""Number of keys that are compared at a time. Its product with the size of a number is a multiple of a page's size."""

COPIED_TASKS = 4096
"""Number of tasks that are copied at a time."""
COUNTS = ("tasks", "keys", "removed", "record_bytes")
"""Fields of `StoreConfig` that count the values of files."""

Score = Callable[[Tensor, Tensor], Tensor]
"""Returns the similarities [B, N] to N keys [N, k], given the numbers of texts [N] of their tasks' densities."""


class PackedTasks(NamedTuple):
    """Tasks as they are appended to a store.

    Attributes:
        records: Packed definition and tensors of each task.
        names: Hash of the name of each task [T].
        thresholds: Similarity of each task below which routed inputs are declined [T].
        key_counts: Number of keys of each task [T].
        keys: Keys of all tasks [N, k].
        owners: Kind and number of texts of the task of each key, without its number [N].
    """

    records: list[bytes]
    names: Array
    thresholds: Array
    key_counts: Array
    keys: Array
    owners: Array


class TaskStore:
    """The tasks in a folder, which all belong to models with the same backbone and the same shared parts.

    Opening it reads a small file only. The other files are mapped to memory, and what is read of a task is compared to
    its checksums. Several processes may read a store while another one changes it; changes wait for each other.

    Attributes:
        folder: The folder.
        config: What the tasks belong to, and the numbers of values when the store was opened or changed last.
    """

    def __init__(self, folder: Path) -> None:
        """Open an existing store, as `TaskStore.open` does.

        Args:
            folder: Folder of the store.
        """
        self.folder = folder
        self.refresh()

    @classmethod
    def create(cls, folder: str | Path, model: HyperAdapterModel) -> Self:
        """Create a store without tasks, for tasks of a model.

        Args:
            folder: Folder to create.
            model: Model whose backbone and shared parts all tasks will have. Its tasks are not appended.

        Returns:
            The store.

        Raises:
            TaskError: If the tasks of the model's method cannot change.
            OutputError: If the folder exists and is not empty, or cannot be written.
        """
        model.method.check_can_change_tasks()
        pha = model.pha
        by_densities = pha.routes_by_densities
        size = len(pha.densities.between) + 1 if by_densities and pha.densities else pha.prototypes.weight.shape[1]
        config = StoreConfig(
            backbone=BackboneReference.of(model),
            model=model.adapter_config,
            lengths=model.lengths,
            shared_sha256=shared_digest(model),
            routing="densities" if by_densities else "prototypes",
            key_size=size,
        )
        create_files(folder, config)
        return cls(Path(folder))

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a store.

        Args:
            folder: Folder of the store.

        Raises:
            CheckpointError: If the store is missing or damaged, or has a newer format.
        """
        return cls(Path(folder))

    def refresh(self) -> None:
        """Read the present state of the folder, which other processes may have changed.

        Raises:
            CheckpointError: If the store is missing or damaged, or has a newer format.
        """
        config = read_config(self.folder)
        tasks, names, keys, owners, records, removed = (
            Column(self.folder / name, dtype, count) for name, dtype, count in columns_of(config)
        )
        gone = np.unique(removed.values)
        if (gone >= config.tasks).any():
            raise damaged(removed.path, "it contains the number of a task that does not exist")
        starts, counts = (tasks.values[name][gone].astype(np.int64) for name in ("first_key", "num_keys"))
        if ((starts < 0) | (counts < 0) | (starts + counts > config.keys)).any() or counts.sum() > config.keys:
            raise damaged(tasks.path, "a removed task has vectors that do not exist")
        self._tasks, self._names, self._keys, self._owners, self._records = tasks, names, keys, owners, records
        self._removed = set(gone.tolist())
        self._removed_keys = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        self.config = config  # last, because other threads may be reading

    def __len__(self) -> int:
        """Return the number of tasks, without removed ones."""
        return self.config.tasks - len(self._removed)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a task of a name."""
        return isinstance(name, str) and bool(self.ids([name]))

    def __iter__(self) -> Iterator[Task]:
        """Iterate over the definitions of all tasks in the order in which they were appended."""
        return (self.task(task_id) for task_id in range(self.config.tasks) if task_id not in self._removed)

    # Reading

    def ids(self, names: Iterable[str]) -> dict[str, int]:
        """Return the numbers of tasks in the store.

        Args:
            names: Names of tasks.

        Returns:
            Number of each task by its name, without the names of tasks that are not in the store.

        Raises:
            CheckpointError: If the file of the names, or that of a task, is damaged.
        """
        wanted = set(names)
        hashes = np.array([name_hash(name) for name in wanted], NAME)
        places = np.flatnonzero(np.isin(self._names.values, hashes)).tolist()
        self._names.release()
        found = {self.task(place).name: place for place in places if place not in self._removed}
        return {name: place for name, place in found.items() if name in wanted}

    def known_ids(self, names: Iterable[str]) -> dict[str, int]:
        """Return the numbers of tasks that have to be in the store.

        Args:
            names: Names of tasks.

        Raises:
            TaskError: If a task is not in the store.
            CheckpointError: If the file of the names, or that of a task, is damaged.
        """
        names = list(names)
        found = self.ids(names)
        if missing := [name for name in names if name not in found]:
            raise TaskError(unknown_task(missing[0], self.folder, len(self)))
        return found

    def task(self, task_id: int) -> Task:
        """Return the definition of a task.

        Args:
            task_id: Number of the task in the store.

        Raises:
            CheckpointError: If the files of the task are damaged.
        """
        return self._checked(task_id)[0]

    def threshold(self, task_id: int) -> float:
        """Return the similarity below which an input routed to a task is declined.

        Args:
            task_id: Number of the task in the store, whose files have been checked by `task`.
        """
        return float(self._tasks.values[task_id]["threshold"])

    def states(self, task_ids: Iterable[int], model: HyperAdapterModel) -> list[TaskState]:
        """Return everything that belongs to tasks.

        Args:
            task_ids: Numbers of the tasks in the store.
            model: Model that the tasks are for, see `check_model`.

        Raises:
            CheckpointError: If the files of a task are damaged.
        """
        return [self._state(task_id, model) for task_id in task_ids]

    def load(self, model: HyperAdapterModel, names: Iterable[str]) -> None:
        """Replace the tasks of a model by tasks of the store. Their outputs are those of the models they came from.

        Args:
            model: Model with the backbone and the shared parts that the tasks belong to.
            names: Names of the tasks. Afterwards, the model has these only, in the order of the store.

        Raises:
            TaskError: If a task is not in the store, there is none, or `names` is a single text.
            CheckpointError: If the model has other shared parts, or files are damaged.
        """
        _check_names(names)
        with model.lock:
            self.check_model(model)
            set_states(model, self.states(sorted(set(self.known_ids(names).values())), model))

    def _state(self, task_id: int, model: HyperAdapterModel) -> TaskState:
        task, record = self._checked(task_id)
        try:
            state = unpack(record, task, model)
        except ValueError as error:
            raise damaged(self._records.path, str(error)) from None
        if not _same(state.threshold, self.threshold(task_id)):
            raise damaged(self._tasks.path, f"task {task_id} has another threshold in {self._records.path.name}")
        return state

    def _checked(self, task_id: int) -> tuple[Task, bytes]:
        """Return the definition and the record of a task after comparing all checksums."""
        row = self._tasks.values[task_id]
        if zlib.crc32(row.tobytes()[: -NUMBER.itemsize]) != row["crc32"]:
            raise damaged(self._tasks.path, f"task {task_id} has another checksum")
        start, keys = int(row["start"]), slice(int(row["first_key"]), int(row["first_key"]) + int(row["num_keys"]))
        record = self._records.values[start : start + int(row["size"])].tobytes()
        if record_digest(record) != row["record_sha256"].tobytes():
            raise damaged(self._records.path, f"task {task_id} has another checksum")
        for column, checksum in ((self._keys, "keys_crc32"), (self._owners, "owners_crc32")):
            if zlib.crc32(column.values[keys].tobytes()) != row[checksum]:
                raise damaged(column.path, f"task {task_id} has another checksum")
        try:
            task = unpack_task(record)
        except ValueError as error:
            raise damaged(self._records.path, str(error)) from None
        if self._names.values[task_id] != name_hash(task.name):
            raise damaged(self._names.path, f"task {task_id} has another name")
        return task, record

    # Routing

    def nearest(self, score: Score, count: int, is_pair: Tensor | None = None) -> tuple[Tensor, Array]:
        """Find the tasks that are most similar to inputs, with one matrix product for each block of keys.

        Args:
            score: Function that computes similarities of the inputs [B, N] to keys.
            count: Number of tasks to find for each input, at least 1.
            is_pair: Whether each input is a pair of texts [B]. Tasks that do not read such inputs are then only found
                for an input if there are no others. Default: every task can be found.

        Returns:
            Similarities [B, C] in descending order, and numbers of the tasks in the store [B, C]. C is smaller than
            `count` if there are fewer tasks. Minus infinity is the similarity to tasks that are not found.

        Raises:
            TaskError: If the store has no tasks.
            CheckpointError: If files are damaged.
        """
        if not len(self):
            raise TaskError(f"{self.folder}: the task store has no tasks to which inputs could be routed; append tasks")
        num_keys = (count - 1) * self.config.most_keys + 1  # among so many there are `count` tasks
        values, keys = self._nearest_keys(score, num_keys, is_pair)
        alone = values[:, :1].isneginf()
        if is_pair is not None and bool(alone.any()):
            of_all = self._nearest_keys(score, num_keys, None)
            values, keys = torch.where(alone, of_all[0], values), torch.where(alone, of_all[1], keys)
        return self._of_tasks(values, self._owners_of(keys.numpy()), min(count, len(self)))

    def _owners_of(self, keys: Array) -> Array:
        """Return the tasks of keys, after comparing them with the keys that the tasks have."""
        owners = self._owners.values["task"][keys]
        if (owners >= self.config.tasks).any():
            raise damaged(self._owners.path, "a vector belongs to a task that does not exist")
        rows = self._tasks.values[owners]
        offsets = keys - rows["first_key"].astype(np.int64)
        if ((offsets < 0) | (offsets >= rows["num_keys"])).any():
            raise damaged(self._owners.path, "a vector belongs to another task")
        return owners

    def _nearest_keys(self, score: Score, count: int, is_pair: Tensor | None) -> tuple[Tensor, Tensor]:
        best: tuple[Tensor, Tensor] | None = None
        for start in range(0, self.config.keys, BLOCK):
            stop = min(start + BLOCK, self.config.keys)
            owners = self._owners.values[start:stop]
            similarity = score(
                torch.from_numpy(self._keys.values[start:stop]), torch.from_numpy(owners["texts"].copy())
            )
            first, last = np.searchsorted(self._removed_keys, (start, stop)).tolist()
            similarity[:, self._removed_keys[first:last] - start] = -torch.inf
            if is_pair is not None:
                reads_pairs = torch.from_numpy(owners["is_pair"] != 0)
                similarity.masked_fill_(is_pair[:, None] != reads_pairs, -torch.inf)
            values, keys = most_similar(similarity, count)
            self._keys.release(start, stop)
            self._owners.release(start, stop)
            if best is not None:  # of equally similar ones, those of earlier blocks come first
                values, keys = torch.cat([best[0], values], dim=1), torch.cat([best[1], keys + start], dim=1)
                values, order = values.sort(dim=1, descending=True, stable=True)
                keys = keys.gather(1, order)
            best = values[:, :count], keys[:, :count]
        assert best is not None
        return best

    @staticmethod
    def _of_tasks(values: Tensor, owners: Array, count: int) -> tuple[Tensor, Array]:
        """Keep the most similar key of each task, of which there are at least `count` in each row."""
        firsts = [sorted(np.unique(row, return_index=True)[1])[:count] for row in owners]
        chosen = np.array(firsts)
        return values.gather(1, torch.from_numpy(chosen)), np.take_along_axis(owners, chosen, axis=1)

    # Changing

    def append(self, model: HyperAdapterModel, names: Sequence[str] | None = None, replace: bool = False) -> None:
        """Append tasks of a model. The time depends on the number of these tasks, not on that of the stored ones.

        Args:
            model: Model with the backbone and the shared parts of the store.
            names: Names of the tasks. Default: all tasks of the model.
            replace: Whether a task replaces an earlier one of the same name. Default: False.

        Raises:
            TaskError: If the model has no such task, or the store has one of the same name and `replace` is False.
            CheckpointError: If the model has other shared parts, or files are damaged.
            OutputError: If the folder cannot be written. The store has not changed then.
        """
        _check_names(names)
        with model.lock, locked(self.folder):
            self.refresh()
            self.check_model(model)
            chosen = range(len(model.tasks)) if names is None else sorted({model.task_id(name) for name in names})
            all_states = model.task_table.states()
            states = [all_states[task_id] for task_id in chosen]
            earlier = self.ids(state.task.name for state in states)
            if earlier and not replace:
                raise TaskError(
                    f"{self.folder}: there is already a task '{next(iter(earlier))}'; rename it, or replace the "
                    "earlier one (replace=True, --replace)"
                )
            if states:
                self._append(self._pack(model, states), sorted(earlier.values()))

    def remove(self, names: Iterable[str]) -> None:
        """Remove tasks. Their records are not found any more, but stay in the files; see `copy`.

        Args:
            names: Names of the tasks.

        Raises:
            TaskError: If a task is not in the store.
            CheckpointError: If files are damaged.
            OutputError: If the folder cannot be written. The store has not changed then.
        """
        _check_names(names)
        with locked(self.folder):
            self.refresh()
            removed = np.array(sorted(self.known_ids(names).values()), NUMBER)
            self._commit({"removed.bin": removed}, {"removed": len(removed)})

    def copy(self, folder: str | Path) -> Self:
        """Copy the tasks to a new store, without what the files contain of removed and replaced tasks.

        All checksums are compared. The new store has the same tasks in the same order, with other numbers.

        Args:
            folder: Folder to create.

        Returns:
            The new store.

        Raises:
            CheckpointError: If files are damaged. There is no new store then.
            OutputError: If the folder exists and is not empty, or cannot be written.
        """
        self.refresh()
        with new_folder(folder) as new:
            create_files(new, self.config.model_copy(update={**dict.fromkeys(COUNTS, 0), "most_keys": 1}))
            copied = type(self)(new)
            for start in range(0, self.config.tasks, COPIED_TASKS):
                stop = min(start + COPIED_TASKS, self.config.tasks)
                task_ids = [task_id for task_id in range(start, stop) if task_id not in self._removed]
                if task_ids:
                    copied._append(self._packed(task_ids), ())
                for column in (self._tasks, self._names, self._keys, self._owners, self._records):
                    column.release()
        return type(self)(Path(folder))

    def _packed(self, task_ids: list[int]) -> PackedTasks:
        """Return tasks of this store in the form in which they are appended to another one."""
        records = [self._checked(task_id)[1] for task_id in task_ids]
        tasks = self._tasks.values[task_ids]
        counts = tasks["num_keys"].astype(np.int64)
        places = np.repeat(tasks["first_key"].astype(np.int64) - np.cumsum(counts) + counts, counts)
        places += np.arange(counts.sum())
        return PackedTasks(
            records,
            self._names.values[task_ids],
            tasks["threshold"],
            counts,
            self._keys.values[places],
            self._owners.values[places],
        )

    def _append(self, added: PackedTasks, replaced: Collection[int]) -> None:
        sizes = np.array([len(record) for record in added.records])
        ends, key_ends = np.cumsum(sizes), np.cumsum(added.key_counts)
        tasks = np.zeros(len(sizes), TASK)
        tasks["start"], tasks["size"] = self.config.record_bytes + ends - sizes, sizes
        tasks["first_key"], tasks["num_keys"] = self.config.keys + key_ends - added.key_counts, added.key_counts
        tasks["threshold"] = added.thresholds
        owners = added.owners.copy()
        owners["task"] = self.config.tasks + np.repeat(np.arange(len(tasks)), added.key_counts)
        for row, record, stop in zip(tasks, added.records, key_ends.tolist(), strict=True):
            keys = slice(stop - int(row["num_keys"]), stop)
            row["record_sha256"] = np.void(record_digest(record))
            row["keys_crc32"] = zlib.crc32(added.keys[keys].tobytes())
            row["owners_crc32"] = zlib.crc32(owners[keys].tobytes())
            row["crc32"] = zlib.crc32(row.tobytes()[: -NUMBER.itemsize])
        columns: dict[str, Array] = {
            "tasks.bin": tasks,
            "names.bin": added.names,
            "keys.bin": added.keys,
            "owners.bin": owners,
            "records.bin": np.frombuffer(b"".join(added.records), np.uint8),
            "removed.bin": np.array(replaced, NUMBER),
        }
        counts = {"tasks": len(tasks), "keys": len(owners), "removed": len(replaced), "record_bytes": int(ends[-1])}
        self._commit(columns, counts, int(added.key_counts.max()))

    def _commit(self, columns: dict[str, Array], added: dict[str, int], most_keys: int = 0) -> None:
        changed = {name: getattr(self.config, name) + number for name, number in added.items()}
        changed["most_keys"] = max(self.config.most_keys, most_keys)
        append_values(self.folder, self.config, columns, changed)
        self.refresh()

    @torch.no_grad()
    def _pack(self, model: HyperAdapterModel, states: Sequence[TaskState]) -> PackedTasks:
        """Return tasks of a model in the form in which they are appended."""
        if self.config.routing == "densities":
            assert model.pha.densities is not None
            densities = torch.stack([state.density for state in states])
            keys = model.pha.densities.keys(densities[:, :-1], densities[:, -1])
            counts, texts = np.ones(len(states), np.int64), densities[:, -1].cpu().numpy()
        else:
            vectors = [state.centroids if len(state.centroids) else state.prototype[None] for state in states]
            keys = normalize(torch.cat(vectors).float(), dim=-1)
            counts, texts = np.array([len(of_task) for of_task in vectors]), np.zeros(len(states))
        owners = np.zeros(len(keys), OWNER)
        owners["is_pair"] = np.repeat([state.task.is_pair for state in states], counts)
        owners["texts"] = np.repeat(texts, counts)
        return PackedTasks(
            [pack(state) for state in states],
            np.array([name_hash(state.task.name) for state in states], NAME),
            np.array([state.threshold for state in states]),
            counts,
            keys.float().cpu().numpy(),
            owners,
        )

    def check_model(self, model: HyperAdapterModel) -> None:
        """Check that the tasks belong to a model.

        Args:
            model: The model, whose tasks do not matter.

        Raises:
            CheckpointError: If the model has another backbone, other settings or other shared parts.
            TaskError: If the tasks of the model's method cannot change.
        """
        model.method.check_can_change_tasks()
        if not self.config.backbone.is_of(model):
            raise CheckpointError(
                f"{self.folder}: has tasks for the backbone '{self.config.backbone.name}' with fingerprint "
                f"{self.config.backbone.fingerprint[:12]}, found a model with {model.fingerprint.bfloat16[:12]}; use "
                "the model that the tasks were made with"
            )
        if (self.config.model, self.config.lengths) != (model.adapter_config, model.lengths):
            raise CheckpointError(f"{self.folder}: has tasks for a model with other settings; use that model")
        if (found := shared_digest(model)) != self.config.shared_sha256:
            raise CheckpointError(
                f"{self.folder}: has tasks for a model whose shared parts have the digest "
                f"{self.config.shared_sha256[:12]}, found {found[:12]}: the model was trained apart or further; use "
                "the model that the tasks were made with"
            )


def unknown_task(name: str, folder: Path, count: int) -> str:
    """Return the error message for a task that is not in a store, whose tasks may be too many to list.

    Args:
        name: Unknown name.
        folder: Folder of the store.
        count: Number of tasks in the store.
    """
    return f"Unknown task {shown(name)}: it is none of the {count} tasks in the task store {folder}."


def _check_names(names: Iterable[str] | None) -> None:
    if isinstance(names, str):
        raise TaskError(f"names: expected a list of names of tasks, found the text {shown(names)}; put it into a list")


def _same(first: float, second: float) -> bool:
    return np.float64(first).tobytes() == np.float64(second).tobytes()
