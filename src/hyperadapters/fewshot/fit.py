"""Fitting one task to a handful of examples, and knowing when to stop."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from hyperadapters.backbones.passes import LowerOutput
from hyperadapters.config import Task
from hyperadapters.core import AdapterWeights, Hypernetwork, OwnAdapter
from hyperadapters.data.examples import Example
from hyperadapters.errors import NotFiniteError
from hyperadapters.heads.task_heads import Head, target_scale, wide_inputs
from hyperadapters.inference.batches import batches_by_length, device_of, to_device
from hyperadapters.inference.finite import check_answers, likely_cause
from hyperadapters.model.model import HyperAdapterModel

Fit = Literal["prototype", "adapter", "shared", "none"]
Stopping = Literal["leave-one-out", "held-out quarter", "fixed", "none"]

MAX_STEPS = 16
EVALUATION_INTERVAL = 4
BATCH_SIZE = 8
FOLDS = 3
FEW_ROWS = 8
"""Rows a label below which one of each label is left out in turn, instead of a quarter once."""
LEARNING_RATES = {"prototype": 1e-2, "adapter": 1e-3, "hypernetwork": 1e-4, "head": 1e-3}
DAMPING = 0.5
"""Strength at which an encoder's own adapter starts from another task's: half keeps more of the frozen features."""
HEAD_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SAME = 1e-6
"""Mean square below which the rows of a label count as one and the same."""
HEAD_PENALTIES = (0.01, 0.1, 1.0, 10.0)
MANY_LOGITS = 2_000_000
"""Rows times labels above which one penalty is tried, on one fold, so that thousands of labels take seconds."""
MIDDLE_PENALTY = 1.0
RIDGE_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)


class Start(NamedTuple):
    """Where a fit starts: a prototype [p], and an adapter if it is not to be the one generated from the prototype."""

    prototype: Tensor
    adapter: AdapterWeights | None = None


@dataclass(frozen=True)
class Fitted:
    """Result of a fit; `adapter` is None where the hypernetwork generates it from the prototype."""

    prototype: Tensor
    adapter: AdapterWeights | None
    head: Head | None
    hypernetwork: Hypernetwork | None
    steps: int
    stopping: Stopping


class _Batch(NamedTuple):
    inputs: dict[str, Tensor]
    lower_output: LowerOutput
    labels: Tensor


class FitExamples:
    """Examples of one task with what the frozen layers make of them, computed once."""

    def __init__(self, model: HyperAdapterModel, task: Task, examples: Sequence[Example]) -> None:
        """Args: examples: with targets; their task ids are not read.

        Raises:
            NotFiniteError: hidden states of an example are not finite.
        """
        self.model, self.task = model, task
        self._collator = model.collator_of([task])
        self.examples = [Example(0, e.text, e.text_pair, e.target) for e in examples]
        self._hidden: dict[int, Tensor] = {}
        self._pooled: dict[int, Tensor] = {}
        self._features: dict[int, Tensor] = {}
        with torch.no_grad():
            for rows in batches_by_length(self.examples, BATCH_SIZE):
                inputs, _ = self._tensors(rows)
                lower_output = model.forward_lower_layers(**inputs)  # type: ignore[arg-type]
                real = inputs["attention_mask"].bool()
                usable = torch.stack([h[m].isfinite().all() for h, m in zip(lower_output.hidden, real, strict=True)])
                what = "what the frozen layers compute"
                check_answers(model, usable, [self.examples[row] for row in rows], [row + 1 for row in rows], what)
                self._hidden.update(
                    zip(rows, (h[m] for h, m in zip(lower_output.hidden, real, strict=True)), strict=True)
                )
                features = lower_output.pooled
                if not model.text_to_text:
                    features = model.head_features(inputs, lower_output.pooled, [task.is_pair] * len(rows))
                self._features.update(zip(rows, features, strict=True))
                self._pooled.update(zip(rows, lower_output.pooled, strict=True))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def targets(self) -> list[int | float | str | None]:
        """The targets, in order."""
        return [example.target for example in self.examples]

    def features(self, rows: Sequence[int]) -> Tensor:
        """What wide heads read of some rows besides the adapted hidden states [B, F]."""
        return torch.stack([self._features[row] for row in rows])

    def outputs(self, rows: Sequence[int], weights: AdapterWeights) -> tuple[Tensor, Tensor]:
        """Pooled last hidden states [B, d], or logits [B, T, V], of some rows under an adapter; and their labels."""
        batch = self._batch(rows)
        decoder_input_ids = None
        if self.model.kind == "encoder-decoder":
            decoder_input_ids = self.model.backbone.prepare_decoder_input_ids_from_labels(batch.labels)  # type: ignore[operator]
        outputs, _ = self.model.forward_with_adapter(batch.inputs, weights, batch.lower_output, decoder_input_ids)
        return outputs, batch.labels

    def _tensors(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Arguments of `model.encode` for some rows, and their labels."""
        batch = to_device(self._collator([self.examples[row] for row in rows]), device_of(self.model))
        labels = batch.pop("labels")
        del batch["task_ids"]
        return batch, labels

    def _batch(self, rows: Sequence[int]) -> _Batch:
        batch, labels = self._tensors(rows)
        real = batch["attention_mask"].bool()
        kept = torch.cat([self._hidden[row] for row in rows])
        hidden = kept.new_zeros(*real.shape, kept.shape[-1])
        hidden[real] = kept
        return _Batch(batch, LowerOutput(hidden, torch.stack([self._pooled[row] for row in rows])), labels)


class _Student(nn.Module):
    """What is trained for a task: some of prototype, adapter and hypernetwork, and the head."""

    def __init__(self, model: HyperAdapterModel, start: Start, head: Head | None, fit: Fit) -> None:
        super().__init__()
        self.prototype = nn.Parameter(start.prototype.detach().clone(), requires_grad=fit in ("prototype", "shared"))
        self.hypernetwork = copy.deepcopy(model.pha.hypernetwork) if fit == "shared" else model.pha.hypernetwork
        adapter = _generate(model, start) if fit == "adapter" else start.adapter
        self.adapter = None if adapter is None else OwnAdapter(adapter)
        self.head = None if head is None else nn.ParameterList([head.weight.clone(), head.bias.clone()])
        self.scale = (0.0, 1.0) if head is None else (head.target_mean, head.target_std)

    def weights(self) -> AdapterWeights:
        if self.adapter is not None:
            found: AdapterWeights = self.adapter()
            return found
        generated: AdapterWeights = self.hypernetwork(self.prototype[None])
        return generated

    def loss(self, data: FitExamples, rows: Sequence[int]) -> Tensor:
        outputs, labels = data.outputs(rows, self.weights())
        if self.head is None:
            return data.model.task_loss(outputs, labels, labels)
        values = F.linear(wide_inputs(outputs, data.features(rows)), self.head[0], self.head[1])
        if data.task.kind == "regression":
            mean, std = self.scale
            return F.mse_loss(values[:, 0], (labels - mean) / std)
        return F.cross_entropy(values, labels.long())

    def optimizer(self, fit: Fit) -> torch.optim.Optimizer:
        trained = {"prototype": [self.prototype] if fit in ("prototype", "shared") else []}
        trained["adapter"] = list(self.adapter.parameters()) if self.adapter is not None and fit == "adapter" else []
        trained["hypernetwork"] = list(self.hypernetwork.parameters()) if fit == "shared" else []
        trained["head"] = list(self.head) if self.head is not None else []
        groups = [{"params": params, "lr": LEARNING_RATES[name]} for name, params in trained.items() if params]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def result(self, steps: int, stopping: Stopping, fit: Fit) -> Fitted:
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
    """Fit a task without touching the model.

    The number of steps is the one with the lowest loss on rows that are left out: one of each label in turn where there
    are few, a quarter of the rows once where there are more. The task is then fitted to all rows for so many steps.

    Args:
        model: gives the start; in evaluation mode.
        data: the examples.
        start: prototype and adapter.
        fit: what is trained, see `fewshot.add_task`.
        max_steps: at most; default `MAX_STEPS`.
        seed: of left-out rows and batches.
        known: see `make_head`.

    Raises:
        NotFiniteError: what an example gives is not finite, or the fitted weights or the loss are not.
    """

    def head_of(rows: Sequence[int]) -> Head | None:
        return make_head(data.task, inputs, data.targets, rows, fit != "none", seed, known)

    everything = list(range(len(data)))
    with torch.no_grad():
        inputs = None if model.text_to_text else _head_inputs(data, _generate(model, start))
    if inputs is not None:
        numbers = range(1, len(data) + 1)
        check_answers(model, inputs.isfinite().all(dim=1), data.examples, numbers, "what the head reads")
    most = 0 if fit == "none" else MAX_STEPS if max_steps is None else max_steps
    folds, stopping = _folds(data, seed) if most else ([], "none")
    curves: list[list[float]] = []
    evaluations: list[int] = []
    for left_out in folds:
        kept = [row for row in everything if row not in left_out]
        student = _Student(model, start, head_of(kept), fit)
        seen = [(step, _loss(student, data, sorted(left_out))) for step in _train(student, data, kept, fit, most, seed)]
        evaluations, curve = map(list, zip(*seen, strict=True))
        curves.append(curve)
    steps = most
    if curves:
        losses = torch.tensor(curves).mean(dim=0).nan_to_num(nan=torch.inf)
        if not losses.isfinite().any():
            raise _not_fitted(model, data, "the loss of the examples that are left out")
        steps = evaluations[int(losses.argmin())]
    student = _Student(model, start, head_of(everything), fit)
    for _ in _train(student, data, everything, fit, steps, seed):
        pass
    if not all(bool(parameter.isfinite().all()) for parameter in student.parameters()):
        raise _not_fitted(model, data, "a fitted weight")
    if not math.isfinite(_loss(student, data, everything[:BATCH_SIZE])):
        raise _not_fitted(model, data, "the loss of the fitted task")
    return student.result(steps, stopping, fit)


def _not_fitted(model: HyperAdapterModel, data: FitExamples, what: str) -> NotFiniteError:
    return NotFiniteError(f"task '{data.task.name}': {what} is not a finite number; {likely_cause(model)}")


def _generate(model: HyperAdapterModel, start: Start) -> AdapterWeights:
    if start.adapter is not None:
        return start.adapter
    weights: AdapterWeights = model.pha.hypernetwork(start.prototype[None])
    return weights


def _train(student: _Student, data: FitExamples, rows: Sequence[int], fit: Fit, steps: int, seed: int) -> Iterator[int]:
    """Train, and stop for a look at the start and after every few steps."""
    yield 0
    if not steps:
        return
    batches = _batches(rows, seed)
    optimizer = student.optimizer(fit)
    for step in range(1, steps + 1):
        loss = student.loss(data, next(batches))
        optimizer.zero_grad()
        # Gradients for these only: the hypernetwork is the model's own, unless it is trained too.
        loss.backward(inputs=[parameter for group in optimizer.param_groups for parameter in group["params"]])
        optimizer.step()
        if step % EVALUATION_INTERVAL == 0 or step == steps:
            yield step


def _batches(rows: Sequence[int], seed: int) -> Iterator[list[int]]:
    generator = random.Random(seed)
    while True:
        order = generator.sample(list(rows), len(rows))
        for start in range(0, len(order), BATCH_SIZE):
            yield order[start : start + BATCH_SIZE]


@torch.no_grad()
def _loss(student: _Student, data: FitExamples, rows: Sequence[int]) -> float:
    parts = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    return sum(float(student.loss(data, part)) * len(part) for part in parts) / len(rows)


def _folds(data: FitExamples, seed: int) -> tuple[list[set[int]], Stopping]:
    """Rows to leave out: sets of one row of each label, or one set of a quarter of the rows of each."""
    groups: dict[object, list[int]] = {}
    for row, target in enumerate(data.targets):
        groups.setdefault(target if data.task.kind == "classification" else None, []).append(row)
    generator = random.Random(seed)
    # A label's only row stays: without it nothing would be known of the label.
    shuffled = [generator.sample(rows, len(rows)) for rows in groups.values() if len(rows) > 1]
    if not shuffled:
        return [], "fixed"
    fewest = min(map(len, shuffled))
    if fewest >= FEW_ROWS:
        return [{row for rows in shuffled for row in rows[: len(rows) // 4]}], "held-out quarter"
    return [{rows[fold % len(rows)] for rows in shuffled} for fold in range(min(FOLDS, fewest))], "leave-one-out"


def _head_inputs(data: FitExamples, weights: AdapterWeights) -> Tensor:
    found: dict[int, Tensor] = {}
    for rows in batches_by_length(data.examples, BATCH_SIZE):
        found.update(zip(rows, wide_inputs(data.outputs(rows, weights)[0], data.features(rows)), strict=True))
    return torch.stack([found[row] for row in range(len(data))])


def make_head(
    task: Task,
    inputs: Tensor | None,
    targets: Sequence[int | float | str | None],
    rows: Sequence[int],
    fitted: bool = True,
    seed: int = 0,
    known: Sequence[Tensor] = (),
) -> Head | None:
    """A head from what heads read [N, F + d] of some rows: from the means of the labels, or a ridge regression.

    Args:
        task: kind and labels.
        inputs: of all rows; None gives None.
        targets: of all rows.
        rows: to use.
        fitted: whether a classification goes on from the means (see `mean_head`) to a logistic regression, with a
            penalty on the distance from there. The penalty, or none of this, is chosen on rows that are left out. Above
            `MANY_LOGITS` there is one penalty to choose.
        seed: of the left-out rows.
        known: weights [C', F + d] of other tasks' heads. What these say of an input can be worth more than what a few
            examples show, or nothing: a second head is made, which reads that too, and the result is the mean of both
            heads, each weighted by how likely the rows are under it that were left out.
    """
    if inputs is None:
        return None
    chosen = inputs[list(rows)].detach().float()
    values = [targets[row] for row in rows]
    head, cost = _make_head(task, chosen, values, fitted, seed)
    directions = _scaled(known, chosen)
    if directions is None or cost is None:
        return head
    informed, informed_cost = _make_head(task, torch.cat([chosen, chosen @ directions.T], dim=1), values, fitted, seed)
    if informed_cost is None or not math.isfinite(informed_cost):
        return head
    width, share = chosen.shape[1], float(torch.tensor(cost - informed_cost).sigmoid())
    weight = informed.weight[:, :width] + informed.weight[:, width:] @ directions
    return head._replace(
        weight=(1 - share) * head.weight + share * weight, bias=(1 - share) * head.bias + share * informed.bias
    )


def _scaled(known: Sequence[Tensor], inputs: Tensor) -> Tensor | None:
    """Rows of the known weights, by which the inputs vary as much in all as by themselves, by each weight alike."""
    varied = [(weight, _variance(inputs @ weight.T)) for weight in known]
    varied = [(weight, variance) for weight, variance in varied if variance > SAME]
    if not varied:
        return None
    each = _variance(inputs) / len(varied)
    return torch.cat([weight * (each / variance) ** 0.5 for weight, variance in varied])


def _variance(values: Tensor) -> float:
    return float((values - values.mean(dim=0)).square().sum(dim=1).mean())


class _Candidate(NamedTuple):
    """A head, and its negative log-likelihood of rows while they are left out; None if none were."""

    head: Head
    cost: float | None = None


def _make_head(
    task: Task, chosen: Tensor, values: Sequence[int | float | str | None], fitted: bool, seed: int
) -> _Candidate:
    if task.kind == "regression":
        return _ridge_head(chosen, torch.tensor([float(value) for value in values]))  # type: ignore[arg-type]
    labels = torch.tensor([int(value) for value in values], device=chosen.device)  # type: ignore[arg-type]
    start = mean_head(chosen, labels, len(task.labels))
    groups = [(labels == label).nonzero()[:, 0].tolist() for label in range(len(task.labels))]
    generator = random.Random(seed)
    shuffled = [generator.sample(group, len(group)) for group in groups if len(group) > 1]
    if not fitted or not shuffled:
        return _Candidate(start)
    folds = min(FOLDS, *map(len, shuffled))
    is_large = len(labels) * len(task.labels) > MANY_LOGITS
    losses = dict.fromkeys([None, MIDDLE_PENALTY] if is_large else [None, *HEAD_PENALTIES], 0.0)
    for fold in range(1 if is_large else folds):
        left_out = sorted(row for group in shuffled for row in group[fold::folds])
        kept = sorted(set(range(len(labels))) - set(left_out))
        head = mean_head(chosen[kept], labels[kept], len(task.labels))
        for penalty in losses:
            trained = head if penalty is None else _logistic_head(chosen[kept], labels[kept], head, penalty)
            logits = F.linear(chosen[left_out], trained.weight, trained.bias)
            losses[penalty] += float(F.cross_entropy(logits, labels[left_out], reduction="sum"))
    losses = {penalty: loss for penalty, loss in losses.items() if math.isfinite(loss)} or {None: math.inf}
    best = min(losses, key=losses.__getitem__)
    head = start if best is None else _logistic_head(chosen, labels, start, best)
    return _Candidate(head, losses[best])


def mean_head(inputs: Tensor, labels: Tensor, num_labels: int) -> Head:
    """The head that goes by the distance of inputs [N, d] to the labels' means; each label has at least one row.

    With m_c the mean of label c's inputs and m that of these means, the logits are
    s * (x - m) . (m_c - m) - s * |m_c - m|^2 / 2. The scale s is the one of `HEAD_SCALES`, over the inputs' variance
    around their labels' means, under which each row is most likely when its label's mean is taken without it.
    """
    means, counts = _label_means(inputs, labels, num_labels)
    spread = (inputs - means[labels]).square().sum() / max(1, len(inputs) - num_labels)
    if spread < SAME:  # one row a label: how far the labels are apart is all that is known
        spread = (means - means.mean(dim=0)).square().sum(dim=1).mean()
    base = 1.0 / float(spread.clamp(min=1e-6))
    if int(counts.min()) < 2:
        return _mean_head(means, base)
    without = (means[labels] * counts[labels, None] - inputs) / (counts[labels, None] - 1)
    logits, middle = F.linear(inputs, *_mean_head(means, base)[:2]), means.mean(dim=0)
    # Without a row its label's mean, and with it m, is another one; m changes the logits of all labels by the same.
    offsets = without - middle
    own = base * (((inputs - middle) * offsets).sum(dim=1) - 0.5 * offsets.square().sum(dim=1))
    logits = logits.scatter(1, labels[:, None], own[:, None])
    likelihoods = {
        scale: float((scale * logits).log_softmax(dim=1).gather(1, labels[:, None]).sum()) for scale in HEAD_SCALES
    }
    return _mean_head(means, base * max(likelihoods, key=likelihoods.__getitem__))


def _logistic_head(inputs: Tensor, labels: Tensor, start: Head, penalty: float) -> Head:
    """Minimise the cross-entropy, plus penalty / 2 times the squared distance of the weight from the start's."""
    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels, reduction="sum")
        loss = loss + penalty / 2 * (weight - start.weight).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return start._replace(weight=weight.detach(), bias=bias.detach())


def _label_means(features: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(labels, minlength=count)
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, labels, features)
    return sums / counts.clamp(min=1)[:, None], counts


def _mean_head(means: Tensor, scale: float) -> Head:
    middle = means.mean(dim=0)
    offsets = means - middle
    weight = scale * offsets
    return Head(weight, -(weight @ middle) - 0.5 * scale * offsets.square().sum(dim=1))


def _ridge_head(features: Tensor, targets: Tensor) -> _Candidate:
    mean, std = target_scale(targets.tolist())
    if len(targets) < 2:
        return _Candidate(Head(features.new_zeros(1, features.shape[1]), features.new_zeros(1), mean, std))
    middle = features.mean(dim=0)
    found = RidgeCV(RIDGE_STRENGTHS).fit((features - middle).cpu().numpy(), ((targets - mean) / std).numpy())
    weight = torch.as_tensor(found.coef_, dtype=torch.float32, device=features.device)[None]
    bias = torch.as_tensor([found.intercept_], dtype=torch.float32, device=features.device) - weight @ middle
    # Of normally distributed errors: the score is minus the mean square of the rows' errors, each left out in turn.
    cost = len(targets) / 2 * math.log(max(-found.best_score_, SAME))
    return _Candidate(Head(weight, bias, mean, std), cost)
