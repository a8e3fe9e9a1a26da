"""Gradient-based fit of one task to a few examples, with early stopping.

`fit_task` trains copies of a task's prototype, adapter or head, and never changes the model. The linear head that the
fit starts from is made by `heads.new_heads.make_head`.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperadapters.backbones.passes import LowerOutput
from hyperadapters.backbones.text_features import sequence_rows
from hyperadapters.config import Task
from hyperadapters.core import AdapterWeights, Hypernetwork, OwnAdapter
from hyperadapters.data.examples import Example
from hyperadapters.data.targets import Target
from hyperadapters.errors import NotFiniteError
from hyperadapters.heads.new_heads import make_head
from hyperadapters.heads.task_heads import Head, target_losses, wide_inputs
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.finite import check_answers, likely_cause
from hyperadapters.model.model import HyperAdapterModel

Fit = Literal["prototype", "adapter", "shared", "none", "head"]
Stopping = Literal["leave-one-out", "held-out quarter", "fixed", "none"]

MAX_STEPS = 16
"""Default maximum number of training steps."""
EVALUATION_INTERVAL = 4
"""Number of training steps between two evaluations on the left-out examples."""
BATCH_SIZE = 8
"""Number of examples in a batch."""
FOLDS = 3
"""Maximum number of folds of the leave-one-out cross-validation."""
FEW_ROWS = 8
"""Number of examples of the rarest label below which one example of each label is left out in turn. With at least as
many, a quarter of the examples is left out once."""
LEARNING_RATES = {"prototype": 1e-2, "adapter": 1e-3, "hypernetwork": 1e-4, "head": 1e-3}
"""Learning rates of AdamW for each group of parameters."""
DAMPING = 0.5
"""Factor by which the effect of an encoder's adapter is reduced where it starts from that of another task, so that more
of the frozen features is kept. With the fit "head" it is one of three factors (see `fewshot.head_fit`)."""


class Start(NamedTuple):
    """Initial values of a fit.

    Attributes:
        prototype: Prototype of shape [p].
        adapter: Adapter weights of one task, each of shape [L, 1, ...], or None if the hypernetwork is to generate them
            from the prototype.
        scale: Factor of the outputs of the generated adapter. Default: 1.
        is_related: Whether the adapter is that of a known task with the same labels and kind of input. Default: False.
    """

    prototype: Tensor
    adapter: AdapterWeights | None = None
    scale: float = 1.0
    is_related: bool = False


@dataclass(frozen=True)
class Fitted:
    """Result of a fit. All tensors are detached from the autograd graph.

    Attributes:
        prototype: Prototype of shape [p].
        adapter: Adapter weights of the task, each of shape [L, 1, ...], or None if the hypernetwork generates them from
            the prototype.
        head: Head of the task, or None for a text-to-text model.
        hypernetwork: Trained copy of the hypernetwork, or None if it was not trained.
        steps: Number of training steps.
        stopping: How the number of steps was chosen (see `fewshot.add_task.FitReport`).
        adapter_scale: Factor on the effect of the initial adapter (see `fewshot.head_fit`).
        name_weight: Weight of the names of labels (see `heads.name_weights`), or None if they are no rows.
    """

    prototype: Tensor
    adapter: AdapterWeights | None
    head: Head | None
    hypernetwork: Hypernetwork | None
    steps: int
    stopping: Stopping
    adapter_scale: float = 1.0
    name_weight: float | None = None


class _Batch(NamedTuple):
    """Collated examples, their cached hidden states, and their labels."""

    inputs: dict[str, Tensor]
    lower_output: LowerOutput
    labels: Tensor


class FitExamples:
    """Examples of one task with their cached hidden states of the frozen layers below the first adapter.

    Attributes:
        model: Model whose frozen layers are used.
        task: Task of the examples.
        examples: The N examples.
    """

    def __init__(self, model: HyperAdapterModel, task: Task, examples: Sequence[Example]) -> None:
        """Compute the hidden states of the examples.

        Args:
            model: Model in evaluation mode.
            task: Task of the examples; the model need not have it.
            examples: N examples with targets. Their task ids are ignored.

        Raises:
            NotFiniteError: If a hidden state of an example is not finite.
        """
        self.model, self.task = model, task
        self._collator = model.collator_of([task])
        self.examples = [Example(0, e.text, e.text_pair, e.target) for e in examples]
        self._hidden: dict[tuple[int, bool], Tensor] = {}  # by row, and whether the sequence is a second text
        self._pooled: dict[int, Tensor] = {}
        self._features: dict[int, Tensor] = {}
        with torch.no_grad():
            for rows in batches_by_length(self.examples, BATCH_SIZE, self.model.adapter_config.separates_texts):
                inputs, _ = self._tensors(rows)
                lower_output = model.forward_lower_layers(**inputs)  # type: ignore[arg-type]
                sequences = model.sequences(inputs)
                real, keys = sequences["attention_mask"].bool(), _keys(rows, sequences)
                hidden = [of_sequence[m] for of_sequence, m in zip(lower_output.hidden, real, strict=True)]
                unusable = {row for (row, _), h in zip(keys, hidden, strict=True) if not h.isfinite().all()}
                usable = torch.tensor([row not in unusable for row in rows])
                what = "the output of the frozen layers"
                check_answers(model, usable, [self.examples[row] for row in rows], [row + 1 for row in rows], what)
                self._hidden.update(zip(keys, hidden, strict=True))
                features = lower_output.pooled
                if not model.text_to_text and not model.adapter_config.separates_texts:
                    features = model.head_features(inputs, lower_output.pooled, [task.is_pair] * len(rows))
                self._features.update(zip(rows, features, strict=True))
                self._pooled.update(zip(rows, lower_output.pooled, strict=True))

    def __len__(self) -> int:
        """Return the number N of examples."""
        return len(self.examples)

    @property
    def targets(self) -> list[Target | None]:
        """Target of each example, of length N."""
        return [example.target for example in self.examples]

    def features(self, rows: Sequence[int]) -> Tensor:
        """Get the features of some examples that do not depend on adapters.

        Args:
            rows: Indices of B examples.

        Returns:
            Features of shape [B, F], as used by wide heads (see `heads.task_heads.TaskHeads`).
        """
        return torch.stack([self._features[row] for row in rows])

    @torch.no_grad()
    def instance_vectors(self, count: int) -> Tensor:
        """Compute the instance vectors of the first examples from their cached hidden states.

        Args:
            count: Number B of examples.

        Returns:
            Instance vectors of shape [B, p].
        """
        return self.model.pha.instance_vectors(torch.stack([self._pooled[row] for row in range(count)]))

    def head_inputs(self, outputs: Tensor, rows: Sequence[int]) -> Tensor:
        """Compute the inputs of the head of the task.

        Args:
            outputs: First result of `outputs` for B examples, for a model with heads.
            rows: Indices of the B examples.

        Returns:
            Inputs of a plain head [B, F] if the heads of the model compare adapted texts, otherwise those of a wide
            head [B, F + d].
        """
        is_plain = self.model.adapter_config.separates_texts
        return outputs if is_plain else wide_inputs(outputs, self.features(rows))

    def outputs(self, rows: Sequence[int], weights: AdapterWeights) -> tuple[Tensor, Tensor]:
        """Run the layers that follow the cached hidden states, with an adapter.

        Args:
            rows: Indices of B examples.
            weights: Adapter weights of one task, each of shape [L, 1, ...].

        Returns:
            A pair of outputs and labels. The outputs are the inputs of plain heads (see
            `HyperAdapterModel.head_inputs`), or the logits of a text-to-text model, of shape [B, S, V]. The labels have
            the shape [B] or [B, S].
        """
        batch = self._batch(rows)
        decoder_input_ids = None
        if self.model.kind == "encoder-decoder":
            decoder_input_ids = self.model.backbone.prepare_decoder_input_ids_from_labels(batch.labels)  # type: ignore[operator]
        outputs, _ = self.model.forward_with_adapter(batch.inputs, weights, batch.lower_output, decoder_input_ids)
        return outputs, batch.labels

    def all_head_inputs(self, weights: AdapterWeights) -> Tensor:
        """Compute the inputs of the head of the task for all examples.

        Args:
            weights: Adapter weights of one task, each of shape [L, 1, ...].

        Returns:
            Inputs of N rows, as described for `head_inputs`.

        Raises:
            NotFiniteError: If the input of an example is not finite.
        """
        found: dict[int, Tensor] = {}
        for rows in batches_by_length(self.examples, BATCH_SIZE, self.model.adapter_config.separates_texts):
            found.update(zip(rows, self.head_inputs(self.outputs(rows, weights)[0], rows), strict=True))
        inputs = torch.stack([found[row] for row in range(len(self))])
        numbers = range(1, len(self) + 1)
        check_answers(self.model, inputs.isfinite().all(dim=1), self.examples, numbers, "the input of the head")
        return inputs

    def _tensors(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Collate some examples into the arguments of `model.forward_lower_layers`, and their labels."""
        batch = to_device(self._collator([self.examples[row] for row in rows]), device_of(self.model))
        labels = batch.pop("labels")
        del batch["task_ids"]
        return batch, labels

    def _batch(self, rows: Sequence[int]) -> _Batch:
        """Collate some examples, and pad their cached hidden states to the same length."""
        batch, labels = self._tensors(rows)
        sequences = self.model.sequences(batch)
        real = sequences["attention_mask"].bool()
        kept = torch.cat([self._hidden[key] for key in _keys(rows, sequences)])
        hidden = kept.new_zeros(*real.shape, kept.shape[-1])
        hidden[real] = kept
        return _Batch(batch, LowerOutput(hidden, torch.stack([self._pooled[row] for row in rows])), labels)


def _keys(rows: Sequence[int], sequences: Mapping[str, Tensor]) -> list[tuple[int, bool]]:
    """Return the example of each sequence of a batch, and whether the sequence is its second text."""
    places = sequence_rows(sequences)
    numbers = range(len(rows)) if places is None else places.tolist()
    return [(rows[place], index >= len(rows)) for index, place in enumerate(numbers)]


class _Student(nn.Module):
    """The trainable parameters of a fit: the head, and the prototype, the adapter or the hypernetwork.

    `fit` determines which of them are trained; see `fewshot.add_task.add_task`.
    """

    def __init__(self, model: HyperAdapterModel, start: Start, head: Head | None, fit: Fit) -> None:
        super().__init__()
        self.prototype = nn.Parameter(start.prototype.detach().clone(), requires_grad=fit in ("prototype", "shared"))
        self.hypernetwork = copy.deepcopy(model.pha.hypernetwork) if fit == "shared" else model.pha.hypernetwork
        adapter = initial_adapter(model, start) if fit == "adapter" else start.adapter
        self.adapter = None if adapter is None else OwnAdapter(adapter)
        self.adapter_scale = start.scale
        self.head = None if head is None else nn.ParameterList([head.weight.clone(), head.bias.clone()])
        self.scale = (0.0, 1.0) if head is None else (head.target_mean, head.target_std)

    def weights(self) -> AdapterWeights:
        """Get the present adapter weights, each of shape [L, 1, ...]."""
        if self.adapter is not None:
            found: AdapterWeights = self.adapter()
            return found
        generated: AdapterWeights = self.hypernetwork(self.prototype[None])
        return generated.scaled(self.adapter_scale)

    def loss(self, data: FitExamples, rows: Sequence[int]) -> Tensor:
        """Compute the mean loss of some examples."""
        outputs, labels = data.outputs(rows, self.weights())
        if self.head is None:
            return data.model.task_loss(outputs, labels, labels).value
        values = F.linear(data.head_inputs(outputs, rows), self.head[0], self.head[1])
        if data.task.kind == "regression":
            mean, std = self.scale
            return F.mse_loss(values[:, 0], (labels - mean) / std)
        if data.task.is_multi_label:
            return target_losses(values, labels).mean() / values.shape[1]
        return F.cross_entropy(values, labels.long())

    def optimizer(self, fit: Fit) -> torch.optim.Optimizer:
        """Create an optimizer of the trainable parameters."""
        trained = {"prototype": [self.prototype] if fit in ("prototype", "shared") else []}
        trained["adapter"] = list(self.adapter.parameters()) if self.adapter is not None and fit == "adapter" else []
        trained["hypernetwork"] = list(self.hypernetwork.parameters()) if fit == "shared" else []
        trained["head"] = list(self.head) if self.head is not None else []
        groups = [{"params": params, "lr": LEARNING_RATES[name]} for name, params in trained.items() if params]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def result(self, steps: int, stopping: Stopping, fit: Fit) -> Fitted:
        """Collect the present values of the parameters."""
        head = None if self.head is None else Head(self.head[0].detach(), self.head[1].detach(), *self.scale)
        adapter = None if self.adapter is None else self.adapter().detach()
        hypernetwork = self.hypernetwork if fit == "shared" else None
        return Fitted(self.prototype.detach(), adapter, head, hypernetwork, steps, stopping)


def fit_task(
    model: HyperAdapterModel,
    data: FitExamples,
    start: Start,
    fit: Fit,
    max_steps: int | None = None,
    seed: int = 0,
    known: Sequence[Tensor] = (),
) -> Fitted:
    """Fit a task to examples without changing the model.

    The number of training steps is the one with the lowest loss of left-out examples. With few examples of each label,
    one example of each label is left out in turn; otherwise, a quarter of the examples is left out once (see
    `FEW_ROWS`). The task is then fitted to all examples with that number of steps.

    Args:
        model: Model in evaluation mode.
        data: Examples of the task.
        start: Prototype and adapter to start from.
        fit: Which parameters are trained; see `fewshot.add_task.add_task`.
        max_steps: Maximum number of training steps. Default: `MAX_STEPS`.
        seed: Seed of the choice of left-out examples and of the order of the batches.
        known: Weights of other tasks' heads to learn from, each of shape [C', F + d]; see `heads.new_heads.make_head`.

    Returns:
        The fitted parameters, the number of steps, and how it was chosen.

    Raises:
        NotFiniteError: If the input of the head is not finite for an example, or if a fitted weight or the loss is not
            finite.
    """

    def head_of(rows: Sequence[int]) -> Head | None:
        return make_head(data.task, inputs, data.targets, rows, fit != "none", seed, known)

    with torch.no_grad():
        inputs = None if model.text_to_text else data.all_head_inputs(initial_adapter(model, start))
    steps = 0 if fit == "none" else MAX_STEPS if max_steps is None else max_steps
    folds, stopping = _folds(data, seed) if steps else ([], "none")
    if folds:
        steps = _best_steps(model, data, start, fit, folds, steps, seed, head_of)
    everything = list(range(len(data)))
    student = _Student(model, start, head_of(everything), fit)
    for _ in _train(student, data, everything, fit, steps, seed):
        pass
    if not all(bool(parameter.isfinite().all()) for parameter in student.parameters()):
        raise _not_fitted(model, data, "a fitted weight")
    if not math.isfinite(_loss(student, data, everything[:BATCH_SIZE])):
        raise _not_fitted(model, data, "the loss of the fitted task")
    return student.result(steps, stopping, fit)


def _best_steps(
    model: HyperAdapterModel,
    data: FitExamples,
    start: Start,
    fit: Fit,
    folds: Sequence[set[int]],
    max_steps: int,
    seed: int,
    head_of: Callable[[Sequence[int]], Head | None],
) -> int:
    """Choose the number of steps with the lowest loss of the left-out examples, averaged over the folds."""
    curves: list[list[float]] = []
    evaluations: list[int] = []
    for left_out in folds:
        kept = [row for row in range(len(data)) if row not in left_out]
        student, checked = _Student(model, start, head_of(kept), fit), sorted(left_out)
        seen = [(step, _loss(student, data, checked)) for step in _train(student, data, kept, fit, max_steps, seed)]
        evaluations, curve = map(list, zip(*seen, strict=True))
        curves.append(curve)
    losses = torch.tensor(curves).mean(dim=0).nan_to_num(nan=torch.inf)
    if not losses.isfinite().any():
        raise _not_fitted(model, data, "the loss of the left-out examples")
    return evaluations[int(losses.argmin())]


def _not_fitted(model: HyperAdapterModel, data: FitExamples, what: str) -> NotFiniteError:
    return NotFiniteError(f"task '{data.task.name}': {what} is not a finite number; {likely_cause(model)}")


def initial_adapter(model: HyperAdapterModel, start: Start) -> AdapterWeights:
    """Get the initial adapter of a fit.

    Args:
        model: Model with the hypernetwork that generates the adapter from the prototype if the start has none.
        start: Prototype and adapter to start from.

    Returns:
        Adapter weights of one task, each of shape [L, 1, ...].
    """
    if start.adapter is not None:
        return start.adapter
    weights: AdapterWeights = model.pha.hypernetwork(start.prototype[None])
    return weights.scaled(start.scale)


def _train(student: _Student, data: FitExamples, rows: Sequence[int], fit: Fit, steps: int, seed: int) -> Iterator[int]:
    """Train, and yield the number of steps done whenever an evaluation is due: at step 0, and at regular intervals."""
    yield 0
    if not steps:
        return
    batches = _batches(rows, seed)
    optimizer = student.optimizer(fit)
    for step in range(1, steps + 1):
        loss = student.loss(data, next(batches))
        optimizer.zero_grad()
        # The student may share the hypernetwork with the model, which must not accumulate gradients.
        loss.backward(inputs=[parameter for group in optimizer.param_groups for parameter in group["params"]])
        optimizer.step()
        if step % EVALUATION_INTERVAL == 0 or step == steps:
            yield step


def _batches(rows: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Yield batches of shuffled rows without end."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(list(rows), len(rows))
        for start in range(0, len(order), BATCH_SIZE):
            yield order[start : start + BATCH_SIZE]


@torch.no_grad()
def _loss(student: _Student, data: FitExamples, rows: Sequence[int]) -> float:
    """Compute the mean loss of any number of examples in batches."""
    parts = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    return sum(float(student.loss(data, part)) * len(part) for part in parts) / len(rows)


def _folds(data: FitExamples, seed: int) -> tuple[list[set[int]], Stopping]:
    """Choose the examples of each fold: one of each label, or a single fold with a quarter of each label's examples.

    Returns:
        The row indices of each fold, and the name of the procedure.
    """
    groups: dict[object, list[int]] = {}
    for row, target in enumerate(data.targets):
        groups.setdefault(target if data.task.kind == "classification" else None, []).append(row)
    generator = random.Random(seed)
    # The only example of a label is never left out, because nothing else is known of that label.
    shuffled = [generator.sample(rows, len(rows)) for rows in groups.values() if len(rows) > 1]
    if not shuffled:
        return [], "fixed"
    fewest = min(map(len, shuffled))
    if fewest >= FEW_ROWS:
        return [{row for rows in shuffled for row in rows[: len(rows) // 4]}], "held-out quarter"
    return [{rows[fold % len(rows)] for rows in shuffled} for fold in range(min(FOLDS, fewest))], "leave-one-out"
