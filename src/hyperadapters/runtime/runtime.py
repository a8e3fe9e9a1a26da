"""The runtime: answers mixed batches from a folder that `interop.runtime.export_runtime` wrote, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hyperadapters.errors import CheckpointError, DataError, NotFiniteError, TaskError, check_int
from hyperadapters.runtime import arithmetic
from hyperadapters.runtime.arithmetic import Groups, Routing
from hyperadapters.runtime.folder import (
    ARRAYS_FILE,
    LOWER_FILE,
    TOKENIZER_FILE,
    UPPER_FILE,
    Array,
    RuntimeTask,
    check_shapes,
    expected_shapes,
    read_arrays,
    read_checked,
    read_settings,
)
from hyperadapters.runtime.inputs import Batch, Input, Tokens, read_inputs, tokenize
from hyperadapters.utils.optional import require

CHUNK_BATCHES = 32
LOWER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
UPPER_INPUTS = ("hidden", "attention_mask", "rows", "slots")
"""Inputs of the graph of the upper layers besides the weights of adapters."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction for one input.

    Attributes:
        task: Name of the task that was given or chosen by routing; None if the input was declined.
        answer: Name of the label, names of any number of labels (multi-label), or number; None if the input was
            declined.
        probabilities: Probability of each label; None for a regression or a declined input.
        nearest: Name of the most similar task, also if the task was given; None if the method cannot route.
        similarity: Similarity to the most similar task, as in `inference.routing.Candidate`; None if the method cannot
            route.
        margin: Difference of this similarity and that to the second most similar task; infinite for a single task.
        accepted: Whether the similarity reaches the threshold of the most similar task, and the input contains words.
    """

    task: str | None
    answer: str | float | tuple[str, ...] | None
    probabilities: dict[str, float] | None
    nearest: str | None
    similarity: float | None
    margin: float | None
    accepted: bool | None


class Runtime:
    """An exported model, run by onnxruntime. Several threads may share one.

    Attributes:
        tasks: Names of the tasks.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """Read a folder. Its sizes and checksums are checked first.

        Args:
            folder: Folder that `hyperadapters export --format runtime` wrote.
            threads: Number of threads of each of the two graphs, which run in turn. Default: one for each core.

        Raises:
            CheckpointError: If the folder is missing, is damaged or has an unknown format.
            DataError: If `threads` is not a positive integer.
            MissingPackageError: If onnxruntime or tokenizers is not installed.
        """
        if threads is not None:
            check_int("threads", threads, 1)
        root = Path(folder)
        self._settings, files = read_settings(root)
        self.tasks = tuple(task.name for task in self._settings.tasks)
        with ThreadPoolExecutor(max_workers=2) as pool:  # the graphs take most of the time
            lower, upper = (pool.submit(_Graph, root, name, files, threads) for name in (LOWER_FILE, UPPER_FILE))
            self._tokenizer = _load_tokenizer(root / TOKENIZER_FILE, read_checked(root, TOKENIZER_FILE, files))
            self._arrays = read_arrays(root / ARRAYS_FILE, read_checked(root, ARRAYS_FILE, files))
            self._lower, self._upper = lower.result(), upper.result()
        self._check(root)
        self._reads_pairs = np.array([task.is_pair for task in self._settings.tasks])
        self._last_adapters: tuple[tuple[int, ...], dict[str, Array]] = (), {}

    def _check(self, root: Path) -> None:
        """Check that graphs and arrays belong together."""
        adapters = self._upper.inputs.keys() - {*UPPER_INPUTS}
        self._adapter_names = tuple(sorted(adapters))
        _check_names(root / LOWER_FILE, "inputs", self._lower.inputs.keys() - {"token_type_ids"}, LOWER_INPUTS[:2])
        _check_names(root / UPPER_FILE, "inputs", self._upper.inputs.keys() - adapters, UPPER_INPUTS)
        _check_names(root / LOWER_FILE, "outputs", self._lower.outputs.keys() - {"embeddings"}, ("hidden", "pooled"))
        _check_names(root / UPPER_FILE, "outputs", self._upper.outputs, ("pooled",))
        # Numbers of axes: hidden states have texts, tokens and units, pooled ones have texts and units.
        axes = [(shape, 2 if name != "hidden" else 3) for name, shape in self._lower.outputs.items()]
        axes += [(self._upper.inputs["hidden"], 3), (self._upper.outputs["pooled"], 2)]
        sizes = {shape[-1] if len(shape) == number else None for shape, number in axes}
        have_tasks = all(len(self._upper.inputs[name]) > 1 for name in adapters)
        if not have_tasks or len(sizes) > 1 or None in sizes:
            raise CheckpointError(f"{root}: expected graphs with hidden states of one size; export the model again")
        hidden_size = next(size for size in sizes if size is not None)
        num_states = 2 if "embeddings" in self._lower.outputs else 1
        shapes = expected_shapes(self._settings, self._arrays, hidden_size, num_states)
        for name in self._adapter_names:
            shape = self._upper.inputs[name]
            shapes[f"adapters.{name}"] = *shape[:1], len(self.tasks), *shape[2:]
        check_shapes(root / ARRAYS_FILE, self._arrays, shapes)

    def predict(
        self, texts: Iterable[Any], task: str | None = None, batch_size: int = 64, decline: bool = True
    ) -> list[Prediction]:
        """Predict the answers to texts in mixed batches.

        Args:
            texts: Strings, pairs of strings, or rows with the columns `text`, `text_pair` and `task` (a list of
                mappings, a DataFrame or a `datasets.Dataset`).
            task: Name of the task of all texts. Default: the task that a row names, or the most similar task for rows
                that name none.
            batch_size: Number of rows in a batch. Default: 64.
            decline: Whether an input without a task is declined if it is not similar enough to any task. If False, it
                is answered for the most similar task, unless it contains no words. Default: True.

        Returns:
            Predictions in the order of the texts.

        Raises:
            DataError: If a text has an unsupported form or does not fit its task, or an option has a wrong type.
            TaskError: If a task is unknown, or a text has no task and the method cannot route.
            NotFiniteError: If the values that are computed for a text are not finite numbers.
            CheckpointError: If a graph cannot be run, because the folder was not written by this library.
        """
        check_int("batch_size", batch_size, 1)
        if not isinstance(decline, bool):
            raise DataError(f"decline: expected True or False, found {decline!r}")
        inputs = read_inputs(texts, self._settings.tasks, task)
        found: list[Prediction] = []
        while chunk := list(islice(inputs, batch_size * CHUNK_BATCHES)):
            found += self._answer_chunk(chunk, len(found), batch_size, decline)
        return found

    def _answer_chunk(self, inputs: list[Input], start: int, batch_size: int, decline: bool) -> list[Prediction]:
        """Answer inputs in batches of similar length; `start` is the number of inputs before them."""
        if self._settings.routing is None and any(entry.task_id is None for entry in inputs):
            raise TaskError("the exported model cannot route: give each input its task")
        tokens = tokenize(self._tokenizer, inputs, self._settings)
        order = sorted(range(len(inputs)), key=lambda row: tokens[row].length)
        answers: dict[int, Prediction] = {}
        for rows in (order[first : first + batch_size] for first in range(0, len(order), batch_size)):
            numbers = [start + row + 1 for row in rows]
            found = self._answer_batch([tokens[row] for row in rows], [inputs[row].task_id for row in rows], decline)
            for row, number, prediction in zip(rows, numbers, found, strict=True):
                if prediction is None:
                    raise NotFiniteError(
                        f"input {number} ({inputs[row].text[:40]!r}): what the model computes is not a finite number; "
                        "export a model whose training did not diverge"
                    )
                answers[row] = prediction
        return [answers[row] for row in range(len(inputs))]

    def _answer_batch(
        self, tokens: Sequence[Tokens], given: Sequence[int | None], decline: bool
    ) -> list[Prediction | None]:
        """Answer a batch, with None for inputs for which values are not finite."""
        batch = Batch.of(tokens, self._settings.padding_id)
        lower = self._run_lower(batch)
        features = arithmetic.mean_of_texts(lower["pooled"], batch.pair_rows, batch.num_inputs)
        has_words = np.array([entry.has_words for entry in tokens])
        routing = self._route(batch, lower, features, has_words)
        task_ids = np.array([-1 if task_id is None else task_id for task_id in given])
        is_kept = np.ones(len(tokens), dtype=bool)
        if routing is not None:
            is_routed = task_ids < 0
            is_kept = ~is_routed | (routing.accepted if decline else has_words)
            task_ids = np.where(is_routed, routing.nearest, task_ids)
        logits = self._logits(batch, lower["hidden"], features, task_ids, is_kept)
        return [
            _prediction(self._settings.tasks, task_ids[row], logits.get(row), _of_row(routing, row))
            for row in range(len(tokens))
        ]

    def _run_lower(self, batch: Batch) -> dict[str, Array]:
        values = zip(LOWER_INPUTS, (batch.ids, batch.mask, batch.types), strict=True)
        return self._lower({name: value for name, value in values if name in self._lower.inputs})

    def _route(self, batch: Batch, lower: Mapping[str, Array], features: Array, has_words: Array) -> Routing | None:
        if self._settings.routing is None:
            return None
        if self._settings.routing == "densities":
            layers = [features]
            if "embeddings" in lower:
                layers.insert(0, arithmetic.mean_of_texts(lower["embeddings"], batch.pair_rows, batch.num_inputs))
            similarity = arithmetic.log_likelihood_ratios(np.stack(layers, axis=1), self._arrays)
        else:
            similarity = arithmetic.cosine_similarities(features, self._arrays)
        if self._settings.separates_texts:
            similarity = arithmetic.exclude(similarity, batch.is_pair, self._reads_pairs)
        return arithmetic.decide(similarity, self._arrays["thresholds"], has_words)

    def _logits(
        self, batch: Batch, hidden: Array, features: Array, task_ids: Array, is_kept: Array
    ) -> dict[int, Array]:
        """Compute the outputs of the heads of the tasks for the inputs that are kept, by the number of the input."""
        kept = np.flatnonzero(is_kept)
        if not len(kept):
            return {}
        sequences = is_kept[batch.input_of_sequence]
        groups = Groups.of(task_ids[batch.input_of_sequence[sequences]])
        (pooled,) = self._upper(
            {
                "hidden": hidden[sequences],
                "attention_mask": batch.mask[sequences],
                "rows": groups.rows,
                "slots": groups.slots,
                **self._adapters(groups.tasks),
            }
        ).values()
        if self._settings.separates_texts:
            pooled = arithmetic.compare_texts(pooled, np.flatnonzero(batch.is_pair[kept]), len(kept))
        found: dict[int, Array] = {}
        for task_id in np.unique(task_ids[kept]):
            rows = np.flatnonzero(task_ids[kept] == task_id)
            weight, bias = (self._arrays[f"heads.{task_id}.{name}"] for name in ("weight", "bias"))
            task = self._settings.tasks[task_id]
            outputs = arithmetic.head_outputs(task, weight, bias, pooled[rows], features[kept[rows]])
            found |= dict(zip(kept[rows].tolist(), outputs, strict=True))
        return found

    def _adapters(self, tasks: Array) -> dict[str, Array]:
        """Return the weights [L, G, ...] of the tasks of groups. They are kept for a batch of the same tasks."""
        wanted = tuple(tasks.tolist())
        last, weights = self._last_adapters
        if last != wanted:
            weights = {name: self._arrays[f"adapters.{name}"][:, tasks] for name in self._adapter_names}
            self._last_adapters = wanted, weights
        return weights


class _Graph:
    """A graph, with the shapes of its inputs and outputs by name, where free sizes are None."""

    def __init__(self, root: Path, name: str, files: Mapping[str, Any], threads: int | None) -> None:
        onnxruntime: Any = require("onnxruntime")
        data = read_checked(root, name, files)
        if b"location" in data:  # the key with which a graph names another file that has its weights
            raise CheckpointError(f"{root / name}: expected a graph with its weights, found one with weights elsewhere")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Waiting threads of one graph would take the cores from the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors have no common class
            raise CheckpointError(f"{root / name}: onnxruntime cannot load the graph: {error}") from None
        self._path = root / name
        if any(value.type != "tensor(float)" for value in self._session.get_outputs()):
            raise CheckpointError(f"{root / name}: expected outputs in float32; export the model again")
        self.inputs, self.outputs = _shapes(self._session.get_inputs()), _shapes(self._session.get_outputs())

    def __call__(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph. Each output has a row for each row of the inputs that have one for each sequence."""
        try:
            found = self._session.run(list(self.outputs), dict(values))
        except Exception as error:  # as above
            raise CheckpointError(f"{self._path}: onnxruntime cannot run the graph: {error}") from None
        if {len(output) for output in found} != {len(values["attention_mask"])}:
            raise CheckpointError(f"{self._path}: expected outputs with a row for each text; export the model again")
        return dict(zip(self.outputs, found, strict=True))


def _shapes(values: Iterable[Any]) -> dict[str, tuple[int | None, ...]]:
    return {value.name: tuple(size if isinstance(size, int) else None for size in value.shape) for value in values}


def _load_tokenizer(path: Path, data: bytes) -> Any:
    tokenizers: Any = require("tokenizers")
    try:
        return tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # errors of tokenizers have no class of their own
        raise CheckpointError(f"{path}: tokenizers cannot load the tokenizer: {error}") from None


def _check_names(path: Path, what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    if {*found} != {*expected}:
        raise CheckpointError(
            f"{path}: expected the {what} {', '.join(sorted(expected))}, found {', '.join(sorted(found))}; export the "
            "model again"
        )


def _of_row(routing: Routing | None, row: int) -> tuple[int, float, float, bool] | None:
    if routing is None:
        return None
    nearest, similarity, margin, accepted = (column[row].item() for column in routing)
    return nearest, similarity, margin, accepted


def _prediction(
    tasks: Sequence[RuntimeTask], task_id: int, logits: Array | None, routed: tuple[int, float, float, bool] | None
) -> Prediction | None:
    """Return the prediction for the outputs of a head, which are None for a declined input.

    The result is None if a value is not finite.
    """
    if (logits is not None and not np.isfinite(logits).all()) or (routed and not np.isfinite(routed[1])):
        return None
    nearest, similarity, margin, accepted = routed or (None, None, None, None)
    name = None if nearest is None else tasks[nearest].name
    if logits is None:
        return Prediction(None, None, None, name, similarity, margin, accepted)
    task = tasks[task_id]
    if task.kind == "regression":
        return Prediction(task.name, float(logits[0]), None, name, similarity, margin, accepted)
    answer: str | tuple[str, ...]
    if task.kind == "multi-label":
        likely = arithmetic.sigmoid(logits).tolist()
        named = zip(task.labels, likely, task.thresholds, strict=True)
        answer = tuple(label for label, one, threshold in named if one > threshold)
    else:
        likely = arithmetic.softmax(logits[None])[0].tolist()
        answer = task.labels[likely.index(max(likely))]
    probabilities = dict(zip(task.labels, likely, strict=True))
    return Prediction(task.name, answer, probabilities, name, similarity, margin, accepted)
