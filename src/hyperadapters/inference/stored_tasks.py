"""Routing and prediction with the tasks of a task store, of which only those in use are in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import islice
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hyperadapters.checkpoints.task_records import set_states
from hyperadapters.checkpoints.task_store import Score, TaskStore, unknown_task
from hyperadapters.config import Task
from hyperadapters.data.bad_rows import BadRows
from hyperadapters.data.examples import Example
from hyperadapters.data.rows import is_absent, iterate_rows, plain
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, TaskError, check_int
from hyperadapters.heads.unfitted import warn_of_unfitted_heads
from hyperadapters.inference.finite import check_answers
from hyperadapters.inference.inputs import as_row, input_reader, read_inputs
from hyperadapters.inference.predictor import CHUNK_BATCHES, FrozenStates, Prediction, Predictor
from hyperadapters.inference.routing import NUM_CANDIDATES, RoutingResult, contains_words, of_batches, result_of
from hyperadapters.model.model import HyperAdapterModel

MAX_TASKS = 1000
"""Default maximum number of tasks in the model at a time."""


def route(
    model: HyperAdapterModel,
    store: TaskStore,
    texts: Iterable[Any],
    batch_size: int = 64,
    num_candidates: int = NUM_CANDIDATES,
) -> list[RoutingResult]:
    """Route texts to the tasks of a store. The tasks of the model do not matter.

    Args:
        model: Model with the backbone and the shared parts that the tasks belong to.
        store: The store, whose thresholds determine which texts are declined.
        texts: Texts in any form that `inference.inputs.read_inputs` reads.
        batch_size: Number of texts in a batch. Default: 64.
        num_candidates: Number of most similar tasks in a result. Default: 3.

    Returns:
        Results in the order of the texts, which are those of a model with all tasks, up to rounding.

    Raises:
        DataError: If a text has an unsupported form, or an argument is out of range.
        TaskError: If the store has no tasks.
        CheckpointError: If the model has other shared parts, or files of the store are damaged.
        NotFiniteError: If the similarities of a text are not finite numbers.
    """
    check_int("batch_size", batch_size, 1)
    check_int("num_candidates", num_candidates, 1)
    store.check_model(model)
    examples = list(read_inputs(texts, model.tasks, None))
    found, _ = _routed(model, store, examples, range(1, len(examples) + 1), batch_size, num_candidates)
    return [result for result, _ in found]


@torch.inference_mode()
def _routed(
    model: HyperAdapterModel,
    store: TaskStore,
    examples: Sequence[Example],
    numbers: Sequence[int],
    batch_size: int,
    num_candidates: int = NUM_CANDIDATES,
) -> tuple[list[tuple[RoutingResult, int]], list[bool]]:
    """Return the routing of inputs and the number of the most similar task, and whether the inputs contain words."""
    found: list[tuple[RoutingResult, int]] = []
    words: list[bool] = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        score, readable = _score(model, store, part, batch_size)
        is_pair = torch.tensor([example.text_pair is not None for example in part])
        separates = model.adapter_config.separates_texts
        values, ids = store.nearest(score, num_candidates, is_pair if separates else None)
        names = {task_id: store.task(task_id).name for task_id in set(ids.flatten().tolist())}
        usable = []
        for of_row, row_ids, has_words in zip(values.tolist(), ids.tolist(), readable, strict=True):
            accepted = has_words and of_row[0] >= store.threshold(row_ids[0])
            found.append((result_of([names[task_id] for task_id in row_ids], of_row, accepted), row_ids[0]))
            usable.append(isfinite(of_row[0]))
        of_part = numbers[start : start + batch_size]
        check_answers(model, torch.tensor(usable), part, of_part, "the similarity to the tasks")
        words += readable
    return found, words


def _score(
    model: HyperAdapterModel, store: TaskStore, examples: Sequence[Example], batch_size: int
) -> tuple[Score, list[bool]]:
    """Return a function that computes similarities of inputs to keys, and whether the inputs contain words."""
    densities = model.pha.densities
    by_densities = store.config.routing == "densities" and densities is not None

    def of_batch(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if by_densities and densities is not None:
            found = densities.project(model.density_features(batch))
        else:
            found = normalize(model.instance_vectors(**batch).float(), dim=-1)
        return found, contains_words(model, batch)

    points, readable = of_batches(model, examples, batch_size, of_batch)
    points = points.float().cpu()
    if by_densities and densities is not None:
        return densities.to_keys(points), readable.tolist()
    return lambda keys, texts: points @ keys.T, readable.tolist()


class StorePredictor(Predictor):
    """Predicts the targets of inputs with the tasks of a store.

    An input names its task, or is routed to one of all tasks in the store. The tasks that a chunk of inputs needs are
    loaded into the model, where they replace those of the chunk before. The result of routing is only in the
    predictions for inputs that were routed, for which the layers below the adapters run twice.

    Attributes:
        store: The store.
        max_tasks: Maximum number of tasks in the model at a time.
    """

    def __init__(
        self,
        model: HyperAdapterModel,
        store: TaskStore,
        batch_size: int = 64,
        decline: bool = True,
        max_tasks: int = MAX_TASKS,
        **options: Any,
    ) -> None:
        """Store the settings.

        Args:
            model: Model with the backbone and the shared parts that the tasks belong to. Its tasks are replaced, and
                it must not be trained or used for other tasks meanwhile.
            store: The store.
            batch_size: Number of inputs in a batch. Default: 64.
            decline: Whether inputs that are not similar enough to any task are declined; see `Predictor`.
            max_tasks: Maximum number of tasks in the model at a time. Default: 1000.
            **options: Further arguments of `Predictor`, except `route`.

        Raises:
            CheckpointError: If the model has other shared parts.
            DataError: If an argument has a wrong type or is too small, or `route` is given.
        """
        if "route" in options:
            raise DataError("route: a predictor with a task store always uses the nearest task; remove it")
        super().__init__(model, batch_size, "nearest", decline, **options)
        check_int("max_tasks", max_tasks, 1)
        store.check_model(model)
        self.store, self.max_tasks = store, max_tasks
        self._loaded: tuple[int, dict[int, int]] = (-1, {})

    def __call__(
        self,
        inputs: Iterable[Any],
        task: str | None = None,
        progress: bool = False,
        frozen: FrozenStates | None = None,
    ) -> Iterator[Prediction]:
        """Predict the targets of inputs lazily. The arguments, result and errors are those of `Predictor`.

        `frozen` is not used. An `Example` among the inputs has the number of its task in the store as its `task_id`.
        """
        total = len(inputs) if isinstance(inputs, Sized) else None
        values = enumerate(iterate_rows(inputs), start=1)
        rows = (value if isinstance(value, Example) else as_row(value, f"input {number}") for number, value in values)
        examples = (example for _, example in self.read_rows(rows, task, BadRows("error")))
        return self._shown(self._stream(examples, (), None), total, progress)

    def predict_tasks(
        self, inputs: Iterable[Any], tasks: Sequence[str] | Literal["*"], progress: bool = False
    ) -> Iterator[list[Prediction]]:
        """Refuse to answer several tasks for each input: the tasks can be loaded and answered by a `Predictor`.

        Args:
            inputs: Inputs.
            tasks: Names of tasks.
            progress: Unused.

        Returns:
            Nothing.

        Raises:
            TaskError: Always.
        """
        raise TaskError("tasks: a predictor with a task store answers one task for each input; load the tasks instead")

    def read_rows(self, rows: Iterable[Any], task: str | None, bad_rows: BadRows) -> Iterator[tuple[Any, Example]]:
        """Return an iterator over rows and what is to be predicted for them, without bad rows.

        Args:
            rows: Rows of the input, or examples with numbers of tasks in the store.
            task: Name of the task of all rows, if there is one.
            bad_rows: What is done with rows that cannot be read.

        Returns:
            Iterator over the rows, each with an example that has the number of its task in the store.

        Raises:
            DataError: During the iteration, if a row has no valid text, unless it is skipped.
            TaskError: During the iteration, if the store has no task of a name.
        """
        rows, number = iter(rows), 0
        while chunk := list(islice(rows, self.batch_size * CHUNK_BATCHES)):
            read = self._reader(chunk, task)
            for row in chunk:
                number += 1
                try:
                    example = row if isinstance(row, Example) else read(row, number)
                except (DataError, TaskError) as error:
                    bad_rows.add(error)
                    continue
                yield row, example

    def _reader(self, rows: Sequence[Any], task: str | None) -> Callable[[Row, int], Example]:
        """Return a function that reads rows of a chunk, so that the names of tasks are searched for once."""
        named = {row.values.get("task") for row in rows if isinstance(row, Row)} if task is None else {task}
        places = self.store.ids(name for name in map(plain, named) if isinstance(name, str))
        known = [self.store.task(place) for place in places.values()]
        read, ids = input_reader(known, None), list(places.values())

        def read_row(row: Row, number: int) -> Example:
            name = plain(row.values.get("task")) if task is None else task
            if not is_absent(name) and name not in places:
                raise TaskError(f"{row.place}: " + unknown_task(str(name), self.store.folder, len(self.store)))
            example = read(row if task is None else Row({**row.values, "task": task}, row.place), number)
            place = None if example.task_id is None else ids[example.task_id]
            return Example(place, example.text, example.text_pair)

        return read_row

    def _answer_chunk(
        self, examples: Sequence[Example], places: Sequence[int], tasks: tuple[Task, ...], frozen: FrozenStates | None
    ) -> list[Prediction]:
        """Predict the examples, whose tasks are numbers in the store; `places` are their indices in the stream."""
        routed = [index for index, example in enumerate(examples) if example.task_id is None]
        inputs, numbers = [examples[index] for index in routed], [places[index] + 1 for index in routed]
        found, readable = _routed(self.model, self.store, inputs, numbers, self.batch_size)
        routings = dict(zip(routed, found, strict=True))
        answered = dict(zip(routed, readable, strict=True))
        ids = {index: example.task_id for index, example in enumerate(examples) if example.task_id is not None}
        for index, (routing, task_id) in routings.items():
            if routing.accepted if self.decline else answered[index]:
                ids[index] = task_id
        predictions = self._of_tasks(examples, places, ids)
        declined = Prediction(None, None, None, None, None, None, None)
        return [
            replace(predictions.get(index, declined), routing=routings[index][0] if index in routings else None)
            for index in range(len(examples))
        ]

    def _of_tasks(
        self, examples: Sequence[Example], places: Sequence[int], ids: dict[int, int]
    ) -> dict[int, Prediction]:
        """Predict examples with the tasks `ids` of the store, as many tasks at a time as the model may have."""
        needed, predictions = sorted(set(ids.values())), dict[int, Prediction]()
        for start in range(0, len(needed), self.max_tasks):
            group = set(needed[start : start + self.max_tasks])
            rows = [index for index, task_id in ids.items() if task_id in group]
            with self.model.lock:
                local = self._load(sorted(group))
                chosen = [Example(local[ids[i]], examples[i].text, examples[i].text_pair) for i in rows]
                found = super()._answer_chunk(chosen, [places[index] for index in rows], self.model.tasks, None)
            predictions.update(zip(rows, found, strict=True))
        return predictions

    def _load(self, ids: list[int]) -> dict[int, int]:
        """Return the ids in the model of tasks of the store, which are loaded unless the model has all of them."""
        revision, local = self._loaded
        if revision != self.model.task_table.revision or not local.keys() >= set(ids):
            set_states(self.model, self.store.states(ids, self.model))
            warn_of_unfitted_heads(self.model.heads, self.model.tasks)
            local = {task_id: index for index, task_id in enumerate(ids)}
            self._loaded = self.model.task_table.revision, local
        return local
