"""Adding a task to a trained model from a few examples.

The prototypes of the known tasks that are most similar to the examples are retrieved, the new task starts from the
adapter of the nearest one, and it is then fitted to the examples with early stopping (see `fewshot.fit`). The transfer
by retrieval follows Zhao et al. 2023, section 3; their released code does not contain it.
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
from hyperadapters.data.short_forms import weights_with_short_forms, with_short_forms
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, TaskError, check_int, check_seed, unknown_name
from hyperadapters.fewshot.fit import BATCH_SIZE, DAMPING, Fit, FitExamples, Start, Stopping, fit_task
from hyperadapters.fewshot.head_fit import fit_head
from hyperadapters.heads.task_heads import Head
from hyperadapters.heads.trained_heads import related_tasks
from hyperadapters.inference.batches import batches_by_length
from hyperadapters.inference.routing import (
    ROUNDING,
    Candidate,
    centroids,
    density_points,
    instance_vectors,
)
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.model.tasks import TaskState

Init = Literal["nearest", "mixture", "mean_instance", "random", "current"]
FITS = ("prototype", "adapter", "shared", "none")
"""Values of `fit` that each model has. A model with `head_inputs` "adapted_texts" also has "head"."""
INITS = ("nearest", "mixture", "mean_instance", "random")
Examples = Iterable[Example | Mapping[str, Any] | Row]
"""Examples with targets: mappings with the keys "text", "text_pair" (for tasks on pairs) and "label", or `Example` or
`Row` objects."""
NUM_NEIGHBOURS = 3
"""Maximum number of similar tasks in a report."""
NUM_KNOWN_HEADS = 8
"""Maximum number of known tasks whose heads the head of a new task can learn from."""


@dataclass(frozen=True)
class TaskChange:
    """How much another task changed because the hypernetwork was trained.

    Attributes:
        adapter: Frobenius norm of the change of its adapter's weights, divided by the norm of the weights before.
        output: Mean absolute change of its logits for the examples of the fitted task.
    """

    adapter: float
    output: float


@dataclass(frozen=True)
class FitReport:
    """Result of `add_task` or `refit_task`.

    Attributes:
        task: Name of the fitted task.
        fit: The argument of the same name.
        init: The argument of the same name.
        neighbours: Known tasks that are most similar to the examples, at most `NUM_NEIGHBOURS`, in descending order of
            similarity.
        examples: Number of examples.
        steps: Number of training steps.
        stopping: How the number of steps was chosen: on one example of each label that was left out in turn
            ("leave-one-out"), on a quarter of the examples that was left out once ("held-out quarter"), not at all
            because no example could be left out ("fixed"), or not at all because nothing was to be trained ("none").
        seconds: Duration of the whole call in seconds.
        adapter_scale: Factor on the effect of the initial adapter that left-out examples chose, with 0 for the frozen
            backbone; None unless `fit` is "head".
        name_weight: Weight of the name or description of a label that left-out examples chose, where an example has the
            weight 1; None unless `fit` is "head" and these are examples.
        changes: Changes of the other tasks by name. Empty unless the hypernetwork was trained.
    """

    task: str
    fit: Fit
    init: Init
    neighbours: tuple[Candidate, ...]
    examples: int
    steps: int
    stopping: Stopping
    seconds: float
    adapter_scale: float | None = None
    name_weight: float | None = None
    changes: dict[str, TaskChange] = field(default_factory=dict)


def add_task(
    model: HyperAdapterModel,
    task: Task,
    examples: Examples = (),
    fit: Fit | None = None,
    init: Init = "nearest",
    k_per_label: int | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> FitReport:
    """Add a task to a trained model from a few examples, or from the names or descriptions of its labels alone.

    The prototype is initialised from those of similar known tasks, and the head by a regularised regression on the
    examples. With `fit` "head", the default of the preset "plus", this is all, and the head also learns from those of
    known tasks with the same labels. Otherwise the task is then trained; the number of steps is chosen on left-out
    examples and can be zero. If heads read frozen features, the new head is a wide one (see
    `heads.task_heads.TaskHeads`), which also learns from those of similar tasks (see `heads.new_heads.make_head`).

    The new task gets the last task id. The outputs of the other tasks stay the same bit for bit, unless `fit` is
    "shared". If an error is raised, the model has not changed.

    Args:
        model: Trained model of the method "pha"; it is changed in place.
        task: The new task. A classification or multi-label task without labels gets the sorted labels of the examples.
        examples: Examples with targets. Their hidden states are held in memory, which takes
            examples * tokens * hidden_size * 4 bytes. Default: none, for a classification task of single texts and the
            fit "head". The descriptions of its labels, or else their names, then take the place of examples. A label
            with a description needs no example with this fit.
        fit: Which parameters are trained besides the head. Default: "head" for a model with `head_inputs`
            "adapted_texts", otherwise "adapter".

            - "prototype": the prototype, from which the hypernetwork generates the adapter.
            - "adapter": the weights of an adapter that belongs to this task. They start from the generated weights,
              which for encoders are first scaled down to half their effect.
            - "shared": the prototype and the hypernetwork. This changes all other tasks without an adapter of their
              own; the report says by how much.
            - "none": nothing. The head is that of the class means, or a ridge regression. If `init` is "nearest" and
              the most similar task has an adapter of its own, that adapter is copied.
            - "head": nothing, and no gradient step is made. The head is a regression on the features of the examples,
              which also learns from the heads of known tasks with the same labels. Left-out examples decide whether the
              initial adapter has its full effect, half of it or none (see `fewshot.head_fit`). For models with
              `head_inputs` "adapted_texts".
        init: How the prototype is initialised.

            - "nearest": with the prototype of the most similar task.
            - "mixture": with the mean of all prototypes, weighted by similarity.
            - "mean_instance": with the direction of the mean instance vector and the mean norm of the prototypes.
            - "random": with a random direction and the mean norm of the prototypes.
        k_per_label: Number of examples of each label to use, or of all examples for a task without labels. Default:
            all examples are used.
        max_steps: Maximum number of training steps. Default: `fewshot.fit.MAX_STEPS`.
        seed: Seed of the subset of examples, the random direction, the left-out examples and the order of the batches.

    Returns:
        The most similar tasks, the number of steps, and how it was chosen.

    Raises:
        TaskError: If the name is taken, the kind or a setting of the task does not suit the backbone, `fit` or `init`
            is unknown, `max_steps` is negative, or the model has another method than "pha".
        DataError: If there are no examples, an example is invalid, or a label of a classification task has no example.
        NotFiniteError: If an output of the model for an example, a fitted weight or the loss is not finite.
    """
    if not isinstance(task, Task):
        raise TaskError(f"expected a Task, such as Task.classification(name, labels); found {task!r}")
    model.method.check_can_change_tasks()
    if not model.text_to_text and (unread := task.settings_of_texts()):
        raise TaskError(
            f"task '{task.name}', {unread[0]}: is for backbones that generate their answers, and this model has task "
            "heads; remove it"
        )
    if task.name in {known.name for known in model.tasks}:
        raise TaskError(f"task '{task.name}' exists; choose another name, or fit it again with refit_task (refit-task)")
    fit = _checked_fit(model, fit)
    _check_choice("init", init, INITS)
    task, rows = _read_examples(task, examples, len(model.tasks), fit, is_new=True)
    model.check_tasks((*model.tasks, task))
    model.collator.check_targets(task, rows)
    return _fit(model, task, rows, fit, init, k_per_label, max_steps, seed, task_id=None)


def refit_task(
    model: HyperAdapterModel,
    name: str,
    examples: Examples,
    fit: Fit | None = None,
    init: Init = "current",
    k_per_label: int | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> FitReport:
    """Fit an existing task again, for example to more examples.

    The task keeps its id. Its head, routing centroids and threshold are replaced by those of these examples. An adapter
    that belongs to the task is removed if `fit` is "prototype" or "shared". The outputs of the other tasks stay the
    same bit for bit, unless `fit` is "shared". If an error is raised, the model has not changed.

    Args:
        model: Trained model of the method "pha"; it is changed in place.
        name: Name of the task.
        examples: Examples with targets; see `add_task`.
        fit: Which parameters are trained besides the head; see `add_task`.
        init: How the prototype is initialised: as in `add_task`, or "current" for the present prototype. With
            "current", the values "adapter", "none" and "head" of `fit` also start from the task's present adapter,
            which keeps its effect with "head" if left-out examples do not prefer the frozen backbone. If it has none,
            it gets one as in `add_task`.
        k_per_label: Number of examples of each label to use; see `add_task`.
        max_steps: Maximum number of training steps; see `add_task`.
        seed: Seed of all random choices; see `add_task`.

    Returns:
        The most similar tasks, the number of steps, and how it was chosen.

    Raises:
        TaskError: If the task, `fit` or `init` is unknown, `max_steps` is negative, or the model has another method
            than "pha".
        DataError: If there are no examples, an example is invalid, or a label of a classification task has no example.
        NotFiniteError: If an output of the model for an example, a fitted weight or the loss is not finite.
    """
    model.method.check_can_change_tasks()
    fit = _checked_fit(model, fit)
    _check_choice("init", init, (*INITS, "current"))
    task_id = model.task_id(name)
    task, rows = _read_examples(model.tasks[task_id], examples, task_id, fit, is_new=False)
    model.collator.check_targets(task, rows)
    return _fit(model, task, rows, fit, init, k_per_label, max_steps, seed, task_id)


def _fit(
    model: HyperAdapterModel,
    task: Task,
    examples: Sequence[Example],
    fit: Fit,
    init: Init,
    k_per_label: int | None,
    max_steps: int | None,
    seed: int,
    task_id: int | None,
) -> FitReport:
    """Fit a task, and add it to the model or replace the one of the given id."""
    started = time.monotonic()
    if max_steps is not None:
        check_int("max_steps", max_steps, 0, TaskError)
        max_steps = int(max_steps)
    check_seed(seed)
    seed = int(seed)  # The random module does not accept NumPy integers.
    if k_per_label is not None:
        check_int("k_per_label", k_per_label, 1)
        examples = subset(examples, task, DataConfig(k_per_label=int(k_per_label)), seed)
    no_autocast = torch.autocast(model.device.type, enabled=False)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad(), no_autocast:
        names = label_examples([task]) if model.adapter_config.label_names or task.descriptions or not examples else []
        data = FitExamples(model, task, [*examples, *names])
        routed = examples or names
        instances = data.instance_vectors(len(routed)) if fit == "head" else instance_vectors(model, routed)
        points = density_points(model, routed) if model.pha.routes_by_densities else torch.empty(0)
        similarity = model.pha.prototypes.similarity(instances).mean(dim=0).detach()
        start = _start(model, task, init, fit, instances, similarity, task_id, seed)
        if fit == "head":
            related = _related_head(model, task, task_id)
            # The adapter of a task that goes without it was made for another task, or harmed this one.
            is_own = init == "current" and task_id is not None and float(model.pha.adapter_scales[task_id]) > 0
            fitted = fit_head(model, data, start, len(examples), related, is_own, seed)
        else:
            fitted = fit_task(model, data, start, fit, max_steps, seed, _known_heads(model, task, similarity, task_id))
        fitted_parts = TaskState(
            task=task,
            prototype=fitted.prototype,
            centroids=centroids(instances, model.adapter_config.centroids_per_task, seed).to(
                model.pha.prototypes.centroids
            ),
            threshold=_threshold(model, instances, points) if examples else _mean_threshold(model),
            # Descriptions are not written like the inputs, so all of them together count as a single text.
            density=_density(model, routed, len(examples) or 1, seed),
            head=None if fitted.head is None else fitted.head.rounded(),
            own_adapter=fitted.adapter,
            adapter_scale=1.0 if fitted.adapter else start.scale * fitted.adapter_scale,
        )
        neighbours = _neighbours(model, similarity, task_id)
        parts = model.task_table.states()
        position = len(parts) if task_id is None else task_id
        parts[position : position + 1] = [fitted_parts]
        if fitted.hypernetwork is None:
            changes = {}
            model.task_table.replace(parts, changed=(task.name,))
        else:
            with _kept_on_failure(model):
                changes = _share(model, data, fitted.hypernetwork, task_id)
                model.task_table.replace(parts)
    seconds = time.monotonic() - started
    return FitReport(
        task.name,
        fit,
        init,
        neighbours,
        len(examples),
        fitted.steps,
        fitted.stopping,
        seconds,
        start.scale * fitted.adapter_scale if fit == "head" else None,
        fitted.name_weight,
        changes,
    )


def _known_heads(model: HyperAdapterModel, task: Task, similarity: Tensor, task_id: int | None) -> list[Tensor]:
    """Get the weights for frozen features of the heads of similar tasks.

    Only tasks that have the same kind of input (single texts or pairs) are considered.

    Returns:
        Weights of at most `NUM_KNOWN_HEADS` heads, each of shape [C', F + d], with zeros for the adapted hidden states.
        They are empty if no head of the model reads frozen features.
    """
    if model.heads is None or not model.heads.reads_features:
        return []
    similar = [
        index
        for index in similarity.argsort(descending=True).tolist()
        if index != task_id and model.tasks[index].is_pair == task.is_pair
    ]
    wide = (model.heads.head(index).weight for index in similar[:NUM_KNOWN_HEADS])
    kept = torch.arange(model.heads.features_size + model.heads.hidden_size) < model.heads.features_size
    return [(weight * kept.to(weight)).float() for weight in wide if weight.shape[1] == len(kept)]


def _related_head(model: HyperAdapterModel, task: Task, task_id: int | None) -> Head | None:
    """Compute the mean head of the known tasks of the same kind, with the same label names and the same kind of input.

    Returns:
        The head, with the labels in the order of the given task, or None if there is no such task.
    """
    assert model.heads is not None
    heads = [
        (model.heads.head(index), [known.labels.index(label) for label in task.labels])
        for index, known in enumerate(model.tasks)
        if index != task_id and _is_related(known, task)
    ]
    if not heads:
        return None
    weight = torch.stack([head.weight[order] for head, order in heads]).mean(dim=0)
    return Head(weight, torch.stack([head.bias[order] for head, order in heads]).mean(dim=0))


def _is_related(known: Task, task: Task) -> bool:
    """Return whether two tasks learn from each other; see `heads.trained_heads.related_tasks`."""
    return len(related_tasks([known, task])) == 1


def _checked_fit(model: HyperAdapterModel, fit: Fit | None) -> Fit:
    """Return the value of `fit` or its default, or raise a TaskError that names the nearest known value."""
    has_fit_of_heads = model.adapter_config.separates_texts
    if fit is None:
        return "head" if has_fit_of_heads else "adapter"
    if fit == "head" and not has_fit_of_heads:
        raise TaskError(
            "fit 'head': expected a model with head_inputs 'adapted_texts', found "
            f"'{model.adapter_config.head_inputs}'; use fit 'adapter' or 'none'"
        )
    _check_choice("fit", fit, (*FITS, "head") if has_fit_of_heads else FITS)
    return fit


def _check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raise a TaskError that names the nearest known value unless the value is known."""
    if value not in known:
        raise TaskError(unknown_name(what, str(value), known))


def _read_examples(task: Task, examples: Examples, task_id: int, fit: Fit, is_new: bool) -> tuple[Task, list[Example]]:
    """Validate the examples, and infer the labels of a classification or multi-label task that has none."""
    given = iterate_rows(examples, "examples")
    rows = [example_row(example, f"example {number}", task) for number, example in enumerate(given, start=1)]
    if not rows:
        if is_new and fit == "head" and task.kind == "classification" and task.label_texts:
            return task, []
        raise DataError(
            f"task '{task.name}': no examples; expected at least one"
            + " of each label" * bool(task.labels and task.kind == "classification")
            + (
                "; only a new classification task of single texts can do without, with labels whose names or "
                "descriptions have letters and the fit 'head'"
            )
            * is_new
        )
    if task.is_labelled and not task.labels:
        labels = infer_labels(rows, task)
        task = parse(Task, {**task.model_dump(), "labels": labels}, DataError, f"task '{task.name}'")
    read = [Example(task_id, *read_fields(row, task), read_target(row, task)) for row in rows]
    seen = {example.target for example in read}
    unseen = [label for index, label in enumerate(task.labels) if index not in seen]
    if unseen and task.kind == "classification" and not (fit == "head" and task.descriptions):
        raise DataError(
            f"task '{task.name}': no example of label(s) {', '.join(unseen)}; expected at least one of each label"
        )
    warn_of_spellings(task, rows)
    return task, read


def _neighbours(model: HyperAdapterModel, similarity: Tensor, task_id: int | None) -> tuple[Candidate, ...]:
    """Get the tasks that are most similar to the examples, except for the fitted one."""
    order = [index for index in similarity.argsort(descending=True).tolist() if index != task_id]
    return tuple(Candidate(model.tasks[i].name, float(similarity[i])) for i in order[:NUM_NEIGHBOURS])


@torch.no_grad()
def _start(
    model: HyperAdapterModel,
    task: Task,
    init: Init,
    fit: Fit,
    instances: Tensor,
    similarity: Tensor,
    task_id: int | None,
    seed: int,
) -> Start:
    """Choose the initial prototype, and the initial adapter if the task is to get weights of its own."""
    prototypes = model.pha.prototypes.weight
    known = similarity.clone()
    if task_id is not None and len(known) > 1:
        known[task_id] = -torch.inf
    chosen = task_id if init == "current" else int(known.argmax())
    if init in ("current", "nearest"):
        assert chosen is not None
        own = str(chosen) in model.pha.own_adapters
        is_related = init == "nearest" and _is_related(model.tasks[chosen], task)
        if fit == "adapter" or (fit in ("none", "head") and own):
            adapter = model.method.adapters(torch.tensor([chosen], device=prototypes.device))
            keeps_effect = init == "current" or fit in ("none", "head")
            adapter = adapter if keeps_effect else _damped(model, adapter)
            return Start(prototypes[chosen], adapter, is_related=is_related)
        scale = float(model.pha.adapter_scales[chosen])
        if fit == "head":
            scale = scale or 1.0  # the frozen backbone was chosen for a task before; this one has a choice again
        return Start(prototypes[chosen], scale=scale if fit in ("none", "head") else 1.0, is_related=is_related)
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
    """Start from a new prototype; only the fit "adapter" needs the weights that are generated from it."""
    return Start(prototype, _damped(model, model.pha.hypernetwork(prototype[None])) if fit == "adapter" else None)


def _damped(model: HyperAdapterModel, weights: AdapterWeights) -> AdapterWeights:
    """Reduce the effect of an encoder's adapter by `DAMPING`; text-to-text models need the full effect."""
    if model.text_to_text:
        return weights
    return weights.scaled(DAMPING)


def _threshold(model: HyperAdapterModel, instances: Tensor, points: Tensor) -> float:
    """Compute the similarity below which an input that is routed to the task is declined.

    It is the lowest cosine similarity between an example and the centroid of all other examples, or with densities that
    of `_density_threshold`. A single example gets the mean threshold of the known tasks.
    """
    if len(points):
        return _density_threshold(model, points)
    if len(instances) < 2:
        return _mean_threshold(model)
    directions = normalize(instances.float(), dim=1)
    others = normalize(directions.sum(dim=0) - directions, dim=1)
    return float((directions * others).sum(dim=1).min()) - ROUNDING


def _density(model: HyperAdapterModel, examples: Sequence[Example], count: int, seed: int) -> Tensor:
    """Return the mean of the examples and a number of them for the task's density; the mean is also of short forms."""
    densities = model.pha.densities
    if densities is None:
        return torch.empty(0)
    if not densities.is_fitted:
        return densities.means.new_zeros(densities.means.shape[1] + 1)
    points = density_points(model, with_short_forms(examples, seed))
    weights = points.new_tensor(weights_with_short_forms(len(examples)))
    mean = (points * weights[:, None]).sum(dim=0) / weights.sum()
    return torch.cat([mean, mean.new_tensor([float(count)])])


def _density_threshold(model: HyperAdapterModel, points: Tensor) -> float:
    """Compute the log-likelihood ratio below which an input that is routed to the task is declined.

    It is the lowest ratio of an example and the density of all other examples. A single example gets the mean threshold
    of the known tasks.

    Args:
        model: Model with fitted densities.
        points: Coordinates of the N examples [N, r].
    """
    if len(points) < 2:
        return _mean_threshold(model)
    others = (points.sum(dim=0) - points) / (len(points) - 1)
    counts = points.new_full((len(points),), len(points) - 1.0)
    assert model.pha.densities is not None
    return float(model.pha.densities.ratios(points, others, counts).diagonal().min()) - ROUNDING


def _mean_threshold(model: HyperAdapterModel) -> float:
    known = model.pha.thresholds[model.pha.thresholds.isfinite()]
    return float(known.mean()) if len(known) else -torch.inf


@contextmanager
def _kept_on_failure(model: HyperAdapterModel) -> Iterator[None]:
    """Context manager that restores the hypernetwork if an exception is raised."""
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
    """Replace the weights of the hypernetwork by the trained ones, and measure how much the other tasks change."""
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
    """Compute the mean absolute difference between a task's logits with two adapters, over the examples.

    For text-to-text models, these are the logits of the target tokens without padding.
    """
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
