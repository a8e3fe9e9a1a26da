"""New tasks from a handful of examples: retrieve a prototype, start from its adapter, fit as far as the examples carry.

Zhao et al. 2023, section 3 (few-shot transfer by retrieval), which the released code leaves out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hyperadapters.backbones.passes import evaluating
from hyperadapters.config import DataConfig, Task, parse
from hyperadapters.core import AdapterWeights, Hypernetwork
from hyperadapters.data.examples import (
    Example,
    example_row,
    infer_labels,
    label_examples,
    read_fields,
    read_target,
    warn_of_spellings,
)
from hyperadapters.data.loading import subset
from hyperadapters.data.rows import iterate_rows
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, TaskError, check_int, unknown_name
from hyperadapters.fewshot.fit import BATCH_SIZE, DAMPING, Fit, FitExamples, Start, Stopping, fit_task
from hyperadapters.inference.batches import batches_by_length
from hyperadapters.inference.routing import ROUNDING, Candidate, centroids, instance_vectors
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.model.tasks import TaskState

Init = Literal["nearest", "mixture", "mean_instance", "random", "current"]
FITS = ("prototype", "adapter", "shared", "none")
INITS = ("nearest", "mixture", "mean_instance", "random")
NUM_NEIGHBOURS = 3
NUM_KNOWN_HEADS = 8
"""Most heads of other tasks that a new one may learn from."""


@dataclass(frozen=True)
class TaskChange:
    """How far another task moved when the shared parts were trained.

    Attributes:
        adapter: change of its adapter's weights, relative to their size (Frobenius norms).
        output: mean absolute change of its logits on the new task's examples.
    """

    adapter: float
    output: float


@dataclass(frozen=True)
class FitReport:
    """What was done for a task.

    Attributes:
        task: its name.
        fit, init: as asked for.
        neighbours: the known tasks most similar to the examples, up to three; the first is "nearest".
        examples: how many there were.
        steps: of training, as many as stopping chose.
        stopping: how the number of steps was chosen.
        seconds: all of it took.
        changes: of the other tasks, by name; empty unless the shared parts were trained.
    """

    task: str
    fit: Fit
    init: Init
    neighbours: tuple[Candidate, ...]
    examples: int
    steps: int
    stopping: Stopping
    seconds: float
    changes: dict[str, TaskChange] = field(default_factory=dict)


def add_task(
    model: HyperAdapterModel,
    task: Task,
    examples: Iterable[Example | Mapping[str, Any] | Row],
    fit: Fit = "adapter",
    init: Init = "nearest",
    k_per_label: int | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> FitReport:
    """Add a task from a handful of examples.

    The prototype starts from those of the known tasks most similar to the examples, a head from the means of the labels
    (of a regression, from a ridge regression); heads are wide ones (see `TaskHeads`). Where heads of known tasks read
    the texts (preset "plus"), the new head also learns from what those of similar tasks make of them (see `make_head`).
    The number of steps is chosen on examples that are left out, and may be 0. The new task gets the last id. No other
    task changes in any bit, unless `fit` is "shared".

    Args:
        model: changed in place, when all went well.
        task: the new one; a classification without labels gets those of the examples, sorted.
        examples: with targets: mappings of `text`, `text_pair` and `label`, or `Example`s. Their hidden states are held
            in memory: rows * tokens * hidden_size * 4 bytes.
        fit: what is trained: "prototype" (its p numbers and the head), "adapter" (weights of the task's own, which
            start from the generated ones, on encoders at half their strength, and the head), "shared" (prototype, head
            and the hypernetwork: other tasks change, and the report says by how much), or "none" (zero steps; the
            most similar task's own adapter, if it has one, is copied).
        init: of the prototype: "nearest" (the most similar task's), "mixture" (of all, weighted by similarity),
            "mean_instance" (the direction of the mean instance vector, at the prototypes' mean length), "random".
        k_per_label: use so many examples of each label (or in all, without labels); default: all.
        max_steps: of training, at most; default: see `fitting`.
        seed: of the subset, random start, left-out examples and batches.

    Raises:
        TaskError: the name is taken, the kind or a setting does not fit the backbone, there is no such `fit` or `init`,
            `max_steps` is negative, or the model is of another method than "pha".
        DataError: no examples, one of them is wrong, or there is none for a label. Nothing has changed then.
        NotFiniteError: what the model computes for an example, or what was fitted, is not finite. Nothing has changed
            then.
    """
    if not isinstance(task, Task):
        raise TaskError(f"expected a Task, such as Task.classification(name, labels); found {task!r}")
    model.method.check_can_change_tasks()
    if not model.text_to_text and (unread := task.settings_of_texts()):
        raise TaskError(
            f"task '{task.name}', {unread[0]}: is for backbones that write their answers, and this model has task "
            "heads; remove it"
        )
    _check_choice("fit", fit, FITS)
    _check_choice("init", init, INITS)
    task, rows = _read_examples(task, examples, len(model.tasks))
    model.check_tasks((*model.tasks, task))
    model.collator.check_targets(task, rows)
    return _fit(model, task, rows, fit, init, k_per_label, max_steps, seed, task_id=None)


def refit_task(
    model: HyperAdapterModel,
    name: str,
    examples: Iterable[Example | Mapping[str, Any] | Row],
    fit: Fit = "adapter",
    init: Init = "current",
    k_per_label: int | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> FitReport:
    """Fit a task anew, to other examples for instance. It keeps its id; no other task changes (see `add_task`).

    Head, centroid and threshold are made anew from these examples. An adapter that the task has of its own is dropped
    when `fit` is "prototype" or "shared".

    Args:
        model, examples, fit, k_per_label, max_steps, seed: as in `add_task`.
        name: of the task.
        init: also "current": its present prototype, and with "adapter" and "none" its present adapter.

    Raises:
        TaskError, DataError: as in `add_task`, or the task is unknown.
    """
    model.method.check_can_change_tasks()
    _check_choice("fit", fit, FITS)
    _check_choice("init", init, (*INITS, "current"))
    task_id = model.task_id(name)
    task, rows = _read_examples(model.tasks[task_id], examples, task_id)
    model.collator.check_targets(task, rows)
    return _fit(model, task, rows, fit, init, k_per_label, max_steps, seed, task_id)


def _fit(
    model: HyperAdapterModel,
    task: Task,
    examples: list[Example],
    fit: Fit,
    init: Init,
    k_per_label: int | None,
    max_steps: int | None,
    seed: int,
    task_id: int | None,
) -> FitReport:
    started = time.monotonic()
    if max_steps is not None:
        check_int("max_steps", max_steps, 0, TaskError)
        max_steps = int(max_steps)
    check_int("seed", seed, 0)
    seed = int(seed)  # the random module takes no integers of NumPy
    if k_per_label is not None:
        check_int("k_per_label", k_per_label, 1)
        examples = subset(examples, task, DataConfig(k_per_label=int(k_per_label)), seed)
    no_autocast = torch.autocast(model.device.type, enabled=False)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad(), no_autocast:
        instances = instance_vectors(model, examples)
        similarity = model.pha.prototypes.similarity(instances).mean(dim=0).detach()
        start = _start(model, init, fit, instances, similarity, task_id, seed)
        names = label_examples([task]) if model.adapter_config.label_names else []
        data = FitExamples(model, task, [*examples, *names])
        fitted = fit_task(model, data, start, fit, max_steps, seed, _known_heads(model, task, similarity, task_id))
        fitted_parts = TaskState(
            task=task,
            prototype=fitted.prototype,
            centroids=centroids(instances, model.adapter_config.centroids_per_task, seed).to(
                model.pha.prototypes.centroids
            ),
            threshold=_threshold(model, instances),
            head=fitted.head,
            own_adapter=fitted.adapter,
        )
        neighbours = _neighbours(model, similarity, task_id)
        parts = model.task_table.states()
        place = len(parts) if task_id is None else task_id
        parts[place : place + 1] = [fitted_parts]
        if fitted.hypernetwork is None:
            changes = {}
            model.task_table.replace(parts)
        else:
            with _kept_on_failure(model):
                changes = _share(model, data, fitted.hypernetwork, task_id)
                model.task_table.replace(parts)
    seconds = time.monotonic() - started
    return FitReport(task.name, fit, init, neighbours, len(examples), fitted.steps, fitted.stopping, seconds, changes)


def _known_heads(model: HyperAdapterModel, task: Task, similarity: Tensor, task_id: int | None) -> list[Tensor]:
    """What the heads of the most similar tasks of the same kind of input make of the frozen features [C, F + d]."""
    if model.heads is None or not model.heads.reads_features:
        return []
    alike = [
        index
        for index in similarity.argsort(descending=True).tolist()
        if index != task_id and model.tasks[index].is_pair == task.is_pair
    ]
    wide = (model.heads.head(index).weight for index in alike[:NUM_KNOWN_HEADS])
    kept = torch.arange(model.heads.features_size + model.heads.hidden_size) < model.heads.features_size
    return [(weight * kept.to(weight)).float() for weight in wide if weight.shape[1] == len(kept)]


def _check_choice(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise TaskError(unknown_name(what, str(value), known))


def _read_examples(task: Task, examples: Iterable[Any], task_id: int) -> tuple[Task, list[Example]]:
    """Check the examples, and take the labels of a new classification from them."""
    given = iterate_rows(examples, "examples")
    rows = [example_row(example, f"example {number}", task) for number, example in enumerate(given, start=1)]
    if not rows:
        raise DataError(
            f"task '{task.name}': no examples; expected at least one" + " of each label" * bool(task.labels)
        )
    if task.kind == "classification" and not task.labels:
        labels = infer_labels(rows)
        task = parse(Task, {**task.model_dump(), "labels": labels}, DataError, f"task '{task.name}'")
    read = [Example(task_id, *read_fields(row, task), read_target(row, task)) for row in rows]
    seen = {example.target for example in read}
    unseen = [label for index, label in enumerate(task.labels) if index not in seen]
    if unseen:
        raise DataError(
            f"task '{task.name}': no example of label(s) {', '.join(unseen)}; expected at least one of each label"
        )
    warn_of_spellings(task, rows)
    return task, read


def _neighbours(model: HyperAdapterModel, similarity: Tensor, task_id: int | None) -> tuple[Candidate, ...]:
    order = [index for index in similarity.argsort(descending=True).tolist() if index != task_id]
    return tuple(Candidate(model.tasks[i].name, float(similarity[i])) for i in order[:NUM_NEIGHBOURS])


@torch.no_grad()
def _start(
    model: HyperAdapterModel,
    init: Init,
    fit: Fit,
    instances: Tensor,
    similarity: Tensor,
    task_id: int | None,
    seed: int,
) -> Start:
    """Prototype to start from; and an adapter where a task that has its own is the start, and the fit can keep it."""
    prototypes = model.pha.prototypes.weight
    known = similarity.clone()
    if task_id is not None and len(known) > 1:
        known[task_id] = -torch.inf
    chosen = task_id if init == "current" else int(known.argmax())
    if init in ("current", "nearest"):
        assert chosen is not None
        own = str(chosen) in model.pha.own_adapters
        if fit == "adapter" or (fit == "none" and own):
            adapter = model.method.adapters(torch.tensor([chosen], device=prototypes.device))
            return Start(prototypes[chosen], adapter if init == "current" or fit == "none" else _damped(model, adapter))
        return Start(prototypes[chosen])
    if init == "mixture":
        return _generated(
            model, fit, (known / model.adapter_config.temperature).softmax(dim=0).to(prototypes) @ prototypes
        )
    length = prototypes.norm(dim=1).mean()
    if init == "mean_instance":
        direction = normalize(normalize(instances, dim=1).mean(dim=0), dim=0)
    else:
        drawn = torch.randn(prototypes.shape[1], generator=torch.Generator().manual_seed(seed))
        direction = normalize(drawn, dim=0).to(prototypes)
    return _generated(model, fit, (length * direction).to(prototypes))


def _generated(model: HyperAdapterModel, fit: Fit, prototype: Tensor) -> Start:
    """Start from a prototype that no task has."""
    return Start(prototype, _damped(model, model.pha.hypernetwork(prototype[None])) if fit == "adapter" else None)


def _damped(model: HyperAdapterModel, weights: AdapterWeights) -> AdapterWeights:
    """An adapter of less effect, which keeps more of the frozen features; a generated text needs all of it."""
    if model.text_to_text:
        return weights
    return weights.scaled(DAMPING)


def _threshold(model: HyperAdapterModel, instances: Tensor) -> float:
    """Lowest similarity of an example to the centroid of the others; of a single example, the known tasks' mean."""
    if len(instances) < 2:
        known = model.pha.thresholds[model.pha.thresholds.isfinite()]
        return float(known.mean()) if len(known) else -torch.inf
    directions = normalize(instances.float(), dim=1)
    others = normalize(directions.sum(dim=0) - directions, dim=1)
    return float((directions * others).sum(dim=1).min()) - ROUNDING


@contextmanager
def _kept_on_failure(model: HyperAdapterModel) -> Iterator[None]:
    """A context that puts the hypernetwork back as it was when it is left by an exception."""
    module, state = model.pha.hypernetwork, copy.deepcopy(model.pha.hypernetwork.state_dict())
    try:
        yield
    except BaseException:
        model.pha.hypernetwork = module
        module.load_state_dict(state)
        raise


@torch.no_grad()
def _share(
    model: HyperAdapterModel, data: FitExamples, hypernetwork: Hypernetwork, task_id: int | None
) -> dict[str, TaskChange]:
    """Give the model the trained hypernetwork, and measure what that does to its other tasks."""
    old = model.pha.hypernetwork
    changes = {}
    for index in range(len(model.tasks)):
        if index == task_id:
            continue
        model.pha.hypernetwork = old
        before = model.method.adapters(torch.tensor([index], device=model.device))
        model.pha.hypernetwork = hypernetwork
        after = model.method.adapters(torch.tensor([index], device=model.device))
        distance = sum(float((before[name] - after[name]).square().sum()) for name in before) ** 0.5
        size = sum(float(tensor.square().sum()) for tensor in before.values()) ** 0.5
        changes[model.tasks[index].name] = TaskChange(
            distance / max(size, 1e-12), _output_change(model, data, index, before, after)
        )
    model.pha.hypernetwork = old
    old.load_state_dict(hypernetwork.state_dict())
    return changes


def _output_change(
    model: HyperAdapterModel, data: FitExamples, task_id: int, before: AdapterWeights, after: AdapterWeights
) -> float:
    """Mean absolute difference of a task's logits on the examples under two adapters; of T5, at real target tokens."""
    total, count = 0.0, 0
    for rows in batches_by_length(data.examples, BATCH_SIZE):
        outputs = []
        for weights in (before, after):
            values, labels = data.outputs(rows, weights)
            if model.heads is None:
                outputs.append(values[labels != -100])
            else:
                task_ids = torch.full((len(rows),), task_id, device=values.device)
                outputs.append(model.heads(values, data.features(rows), task_ids))
        total += float((outputs[0] - outputs[1]).abs().sum())
        count += outputs[0].numel()
    return total / count
