"""Promise 3: a new task from a handful of examples, and not a bit of another task changes; all or nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    MANY_LABELS,
    NEW,
    NEW_ROWS,
    add_new,
    empty_centroids,
    lived_in,
    make_batch,
    make_model,
    rows_of,
    tiny_backbone,
    tiny_tokenizer,
)
from safetensors.torch import load_file
from torch import Tensor

from hyperadapters.config import ModelConfig, Task
from hyperadapters.core import AdapterWeights, OwnAdapter
from hyperadapters.data.examples import Example
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, HyperAdaptersError, OutputError, TaskError
from hyperadapters.fewshot import add_task as fewshot
from hyperadapters.fewshot.add_task import FITS, INITS, FitReport
from hyperadapters.fewshot.fit import DAMPING, FitExamples
from hyperadapters.heads import task_heads as heads
from hyperadapters.heads.new_heads import MEAN_SCALES, make_head
from hyperadapters.heads.regression import RIDGE_STRENGTHS
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.served_model import task_digests

KINDS = ("bert", "t5")
KNOWN = ("colour", "size", "mood")
ALONE = ("none", "prototype", "adapter")
Rows = list[dict[str, Any]]


def refit(model: HyperAdapterModel, name: str, **options: Any) -> FitReport:
    rows = rows_of(model.tasks[model.task_id(name)])
    return model.refit_task(name, rows, **{"max_steps": 2, "k_per_label": 1, **options})


def outputs(model: HyperAdapterModel, kind: str, names: Iterable[str]) -> dict[str, Tensor]:
    """What a mixed batch of these tasks gives, among those the model began with."""
    batch = make_batch(kind, rows=8)
    ids = {task_id: model.task_id(name) for task_id, name in enumerate(KNOWN) if name in names}
    rows = torch.tensor([task_id in ids for task_id in batch["task_ids"].tolist()])
    batch = {name: tensor[rows] for name, tensor in batch.items()}
    batch["task_ids"] = torch.tensor([ids[task_id] for task_id in batch["task_ids"].tolist()])
    with torch.no_grad():
        found = {"logits": model(**batch).logits}
        labels = batch.pop("labels")
        if model.text_to_text:
            found["tokens"] = model.generate(**batch, max_new_tokens=5)
        elif len(labels):
            found["without labels"] = model(**batch).logits
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name, value in expected.items() if not _is_equal(found[name], value)]
    assert differing == []


def _is_equal(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(second, Tensor) else first == second


def stored(model: HyperAdapterModel, folder: Path) -> tuple[dict[str, dict[str, bytes]], dict[str, bytes]]:
    """The bytes of a saved model: those of each task by its name, and those that tasks share."""
    model.save_pretrained(folder)
    tasks = json.loads((folder / "hyperadapter.json").read_text())["tasks"]
    names = [task["name"] for task in tasks]
    (weights,) = folder.glob("adapters-*.safetensors")
    of_task: dict[str, dict[str, bytes]] = {task["name"]: {"task": json.dumps(task).encode()} for task in tasks}
    shared = {}
    for key, tensor in load_file(weights).items():
        module, _, rest = key.rpartition(".")
        if key in (
            "method.prototypes.weight",
            "method.prototypes.centroids",
            "method.thresholds",
            "heads.target_mean",
            "heads.target_std",
            "heads.temperature",
            "heads.error_bounds",
        ):
            for name, part in zip(names, tensor, strict=True):
                of_task[name][key] = part.numpy().tobytes()
        elif found := re.fullmatch(r"method\.own_adapters\.(\d+)", module):
            of_task[names[int(found[1])]][f"own_adapters.{rest}"] = tensor.numpy().tobytes()
        elif module == "heads":
            assert rest in ("weight", "wide_weight", "single_weight", "compares", "bias", "starts")
        else:
            shared[key] = tensor.numpy().tobytes()
    for name, head in zip(names, [] if model.heads is None else model.heads.unpack(), strict=model.heads is not None):
        of_task[name]["head"] = head.weight.numpy().tobytes() + head.bias.numpy().tobytes()
    return of_task, shared


class Everything:
    """A model's tasks and all its numbers at one moment."""

    def __init__(self, model: HyperAdapterModel) -> None:
        self.tasks, self.own = model.tasks, list(model.method.own_adapters)
        self.state = {name: value.detach().clone() for name, value in model.adapter_state_dict().items()}

    def assert_same(self, model: HyperAdapterModel) -> None:
        assert model.tasks == self.tasks
        assert list(model.method.own_adapters) == self.own
        assert_equal(model.adapter_state_dict(), self.state)


# 1. Other tasks stay as they are


Change = Callable[[HyperAdapterModel], Any]


def _changes() -> Iterator[Any]:
    for fit in ALONE:
        for init in INITS:
            yield pytest.param(lambda m, f=fit, i=init: add_new(m, fit=f, init=i), "new", id=f"add {fit} {init}")
        yield pytest.param(lambda m, f=fit: refit(m, "mood", fit=f), "mood", id=f"refit mood {fit}")
    yield pytest.param(lambda m: refit(m, "size", init="nearest"), "size", id="refit size adapter nearest")
    yield pytest.param(lambda m: refit(m, "colour", init="mixture"), "colour", id="refit colour adapter mixture")
    for name in KNOWN:
        yield pytest.param(lambda m, n=name: m.remove_task(n), name, id=f"remove {name}")
        yield pytest.param(lambda m, n=name: m.rename_task(n, "other"), name, id=f"rename {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("change", "changed"), list(_changes()))
def test_a_change_of_one_task_leaves_the_others_as_they_are_bit_for_bit(
    kind: str, change: Change, changed: str, tmp_path: Path
) -> None:
    model = lived_in(kind)
    others = [name for name in KNOWN if name != changed]
    before, (parts_before, shared_before) = outputs(model, kind, others), stored(model, tmp_path)
    change(model)
    assert_equal(outputs(model, kind, others), before)
    parts, shared = stored(model, tmp_path)
    assert shared == shared_before
    for name in others:
        assert parts[name] == parts_before[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_task_with_centroids_does_not_change_the_digests_of_the_others(kind: str) -> None:
    model = make_model(kind)
    model.tokenizer = tiny_tokenizer()
    before = task_digests(model.eval())
    add_new(model)
    assert model.pha.prototypes.centroids.shape[1] > 0
    found = task_digests(model)
    assert found.pop("new") not in before.values()
    assert found == before


@pytest.mark.parametrize("kind", [*KINDS, "roberta"])
@pytest.mark.parametrize("seed", range(2))
def test_many_changes_in_a_row_leave_the_others_as_they_are_bit_for_bit(kind: str, seed: int, tmp_path: Path) -> None:
    model, generator = lived_in(kind, centroids_per_task=2), random.Random(seed)
    others = ["colour", "mood"]
    before, (parts_before, shared_before) = outputs(model, kind, others), stored(model, tmp_path)
    made = ["size"]
    for step in range(8):
        name = generator.choice(made)
        action = generator.choice(["add", "refit", "rename", "remove"]) if step else "add"
        fit, init = generator.choice(ALONE), generator.choice(INITS)
        if action == "add":
            made.append(f"task {step}")
            task = Task.classification(made[-1], MANY_LABELS[: generator.randint(2, 5)])
            model.add_task(task, rows_of(task, 1), fit=fit, init=init, max_steps=1, seed=step)
        elif action == "refit":
            refit(model, name, fit=fit, init=init, max_steps=1, seed=step)
        elif action == "rename":
            made[made.index(name)] = f"renamed {step}"
            model.rename_task(name, f"renamed {step}")
        elif len(made) > 1:
            made.remove(name)
            model.remove_task(name)
        assert_equal(outputs(model, kind, others), before)
    assert {task.name for task in model.tasks} == {*others, *made}
    parts, shared = stored(model, tmp_path)
    assert shared == shared_before
    assert [parts[name] for name in others] == [parts_before[name] for name in others]


@pytest.mark.parametrize("kind", KINDS)
def test_removing_an_added_task_gives_the_earlier_model_back(kind: str) -> None:
    model = lived_in(kind)
    before = Everything(model)
    add_new(model, fit="adapter")
    model.remove_task("new")
    before.assert_same(model)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_behind_a_removed_task_move_up_by_one(kind: str) -> None:
    model = lived_in(kind)
    add_new(model, fit="adapter")
    model.remove_task("size")
    assert [task.name for task in model.tasks] == ["colour", "mood", "new"]
    assert [model.task_id(name) for name in ("colour", "mood", "new")] == [0, 1, 2]
    assert list(model.method.own_adapters) == ["1", "2"]
    assert [
        row.shape[0]
        for row in (model.method.thresholds, model.method.prototypes.weight, model.method.prototypes.centroids)
    ] == [
        3,
        3,
        3,
    ]
    with pytest.raises(TaskError, match="expected 0 to 2"):
        model(**{**make_batch(kind, rows=1), "task_ids": torch.tensor([3])})


def _adapter_change(model: HyperAdapterModel, before: HyperAdapterModel, task_id: int) -> float:
    with torch.no_grad():
        ids = torch.tensor([task_id])
        pairs = list(zip(model.method.adapters(ids).values(), before.method.adapters(ids).values(), strict=True))
    moved = sum(float((new.double() - old.double()).square().sum()) for new, old in pairs)
    return (moved / sum(float(old.double().square().sum()) for _, old in pairs)) ** 0.5


def _logits_on(model: HyperAdapterModel, task_id: int, task: Task, rows: Rows) -> Tensor:
    """Logits of a task on examples of another one."""
    collator = copy.copy(model.collator)
    collator.tasks = (task,)
    targets = [task.labels.index(row["label"]) for row in rows]
    examples = [Example(0, row["text"], None, target) for row, target in zip(rows, targets, strict=True)]
    batch = collator(examples)
    batch["task_ids"] = torch.full((len(rows),), task_id)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["new", "size"])
def test_sharing_changes_the_others_as_much_as_the_report_says(kind: str, name: str) -> None:
    model, before = lived_in(kind), lived_in(kind)
    task = Task.classification(name, ["no", "yes"])
    if name == "size":
        for each in (model, before):
            each.remove_task("size")
            each.add_task(task, rows_of(task), fit="none")
    rows = rows_of(task)[1:]
    options: dict[str, Any] = {"fit": "shared", "init": "nearest", "max_steps": 6}
    report = model.refit_task(name, rows, **options) if name == "size" else model.add_task(task, rows, **options)
    assert report.steps == 6
    others = {known.name: task_id for task_id, known in enumerate(before.tasks) if known.name != name}
    assert report.changes.keys() == others.keys()
    for other, task_id in others.items():
        change = report.changes[other]
        logits, logits_before = (_logits_on(each, task_id, task, rows) for each in (model, before))
        if other == "mood":
            assert (change.adapter, change.output) == (0.0, 0.0)
            assert torch.equal(logits, logits_before)
        else:
            assert change.adapter > 0
            assert change.output > 0
            assert change.adapter == pytest.approx(_adapter_change(model, before, task_id), rel=1e-3)
            assert change.output == pytest.approx(float((logits - logits_before).abs().mean()), rel=2e-2)
    assert_equal(outputs(model, kind, ["mood"]), outputs(before, kind, ["mood"]))
    assert not torch.equal(outputs(model, kind, ["colour"])["logits"], outputs(before, kind, ["colour"])["logits"])
    assert torch.equal(model.method.prototypes.weight[:1], before.method.prototypes.weight[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", ALONE)
def test_nothing_is_reported_as_changed_when_nothing_is_shared(kind: str, fit: str) -> None:
    assert add_new(lived_in(kind), fit=fit).changes == {}


# 2. Saving and loading


@pytest.mark.parametrize("kind", [*KINDS, "roberta"])
def test_changed_tasks_survive_saving_and_loading_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = lived_in(kind, centroids_per_task=2)
    add_new(model, fit="adapter")
    price = Task.regression("price") if kind != "t5" else Task.text_to_text("price")
    model.add_task(price, rows_of(price), k_per_label=1, max_steps=2)
    plain = Task.classification("plain", ["no", "yes"])
    model.add_task(plain, rows_of(plain), fit="prototype", max_steps=4)
    model.remove_task("size")
    model.rename_task("mood", "feeling")
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone(kind))
    assert [task.name for task in loaded.tasks] == ["colour", "feeling", "new", "price", "plain"]
    assert loaded.tasks == model.tasks
    assert sorted(loaded.method.own_adapters) == ["1", "2", "3"]
    assert torch.equal(loaded.method.thresholds, model.method.thresholds)
    assert_equal(loaded.adapter_state_dict(), dict(model.adapter_state_dict()))
    batch = make_batch(kind)
    del batch["labels"]
    decoder = {} if kind != "t5" else {"decoder_input_ids": torch.full((6, 3), 5)}
    with torch.no_grad():
        for ids in ([0, 1, 2, 3, 4, 2], *([task_id] * 6 for task_id in range(5))):
            batch["task_ids"] = torch.tensor(ids)
            assert torch.equal(loaded(**batch, **decoder).logits, model(**batch, **decoder).logits)
            if kind == "t5":
                options = {**batch, "max_new_tokens": 5}
                assert torch.equal(loaded.generate(**options), model.generate(**options))
    loaded.tokenizer = tiny_tokenizer()
    texts = ["w1 w2", "good bad", "w9", "w30 w31 w32"]
    assert loaded.route(texts) == model.route(texts)


def test_a_loaded_model_takes_tasks_exactly_as_the_saved_one_does(tmp_path: Path) -> None:
    model = lived_in("bert")
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    loaded.tokenizer = tiny_tokenizer()
    add_new(model)
    add_new(loaded)
    Everything(model).assert_same(loaded)


# 3. The report


def _similarities(model: HyperAdapterModel, rows: Rows) -> dict[str, float]:
    """Mean cosine similarity of the rows to each task's nearest key, or its prototype where it has no key."""
    found: dict[str, list[float]] = {task.name: [] for task in model.tasks}
    for row in rows:
        batch = model.collator.inputs([Example(None, row["text"])])
        instance = model.instance_vectors(**batch)[0].detach().double().numpy()
        for task_id, task in enumerate(model.tasks):
            keys = [key for key in model.method.prototypes.centroids[task_id].double().numpy() if key.any()]
            points = keys or [model.method.prototypes.weight[task_id].detach().double().numpy()]
            cosines = [point @ instance / np.linalg.norm(point) / np.linalg.norm(instance) for point in points]
            found[task.name].append(float(max(cosines)))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("kind", [*KINDS, "roberta"])
@pytest.mark.parametrize("has_keys", [False, True])
def test_neighbours_are_the_most_similar_tasks_with_their_cosine_similarity(kind: str, has_keys: bool) -> None:
    model = lived_in(kind, centroids_per_task=2)
    add_new(model, fit="none", init="random")
    with torch.no_grad():
        keys = empty_centroids(model, 2)
        if has_keys:
            keys.normal_()
            keys[0, 1] = 0
    task = Task.classification("last", ["no", "yes"])
    expected = sorted(_similarities(model, rows_of(task)).items(), key=lambda item: -item[1])[:3]
    report = model.add_task(task, rows_of(task), fit="none")
    assert [known.task for known in report.neighbours] == [name for name, _ in expected]
    assert [known.similarity for known in report.neighbours] == pytest.approx([s for _, s in expected], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refitted_task_is_no_neighbour_of_its_own(kind: str) -> None:
    model = lived_in(kind)
    expected = _similarities(model, rows_of(model.tasks[1]))
    report = refit(model, "size", fit="none", init="nearest", k_per_label=None)
    assert {known.task for known in report.neighbours} == {"colour", "mood"}
    for known in report.neighbours:
        assert known.similarity == pytest.approx(expected[known.task], abs=1e-5)
    nearest = model.task_id(report.neighbours[0].task)
    assert torch.equal(model.method.prototypes.weight[1], model.method.prototypes.weight[nearest])


@pytest.mark.parametrize(
    ("fit", "counts", "stopping"),
    [
        *(
            (fit, counts, stopping)
            for fit in FITS
            for counts, stopping in (((1, 1), "fixed"), ((1, 3), "leave-one-out"), ((2, 3), "leave-one-out"))
        ),
        ("prototype", (7, 9), "leave-one-out"),
        ("adapter", (8, 9), "held-out quarter"),
    ],
)
def test_the_report_says_how_the_steps_were_chosen(fit: str, counts: tuple[int, int], stopping: str) -> None:
    task = Task.classification("new", ["no", "yes"])
    rows = [
        {"text": f"w{n}", "label": label}
        for label, count in zip(task.labels, counts, strict=True)
        for n in range(count)
    ]
    report = lived_in("bert").add_task(task, rows, fit=fit, max_steps=4)
    assert (report.task, report.fit, report.init, report.examples) == ("new", fit, "nearest", sum(counts))
    assert report.stopping == ("none" if fit == "none" else stopping)
    assert report.steps in ((0,) if fit == "none" else (4,) if stopping == "fixed" else (0, 4))
    assert report.seconds > 0


@pytest.mark.parametrize(("count", "stopping"), [(1, "fixed"), (2, "leave-one-out"), (8, "held-out quarter")])
def test_rows_without_labels_count_as_one_group(count: int, stopping: str) -> None:
    rows = [{"text": f"w{n} w{n + 1}", "label": float(n)} for n in range(count)]
    assert lived_in("bert").add_task(Task.regression("new"), rows, max_steps=4).stopping == stopping
    rows = [{"text": f"w{n} w{n + 1}", "label": f"w{n}"} for n in range(count)]
    assert lived_in("t5").add_task(Task.text_to_text("new"), rows, max_steps=4).stopping == stopping


def test_labels_come_sorted_from_the_examples() -> None:
    model = lived_in("bert")
    rows = [{"text": "w1", "label": "z"}, {"text": "w2", "label": "a"}, {"text": "w3", "label": 7}]
    model.add_task(Task(name="new"), rows, fit="none")
    assert model.tasks[-1].labels == ("7", "a", "z")
    assert model.task_id("new") == 3


def test_examples_may_be_mappings_examples_or_rows_of_a_file() -> None:
    task = Task.classification("new", ["no", "yes"])
    rows = rows_of(task)
    given: list[list[Any]] = [
        rows,
        [Example(None, row["text"], None, task.labels.index(row["label"])) for row in rows],
        [Row(row, "a file") for row in rows],
    ]
    states = []
    for examples in given:
        model = lived_in("bert")
        model.add_task(task, iter(examples), max_steps=4)
        states.append(dict(model.adapter_state_dict()))
    assert_equal(states[1], states[0])
    assert_equal(states[2], states[0])


# 4. It learns


def _tone_rows(words: range) -> Rows:
    """One word that settles the label, beside one of these."""
    tones = (("no", "bad"), ("yes", "good"))
    return [{"text": f"{tone} w{word}", "label": label} for word in words for label, tone in tones]


def _answers(model: HyperAdapterModel, name: str, rows: Rows) -> Tensor:
    task_id = model.task_id(name)
    with torch.no_grad():
        return model(**model.collator([Example(task_id, row["text"]) for row in rows])).logits


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("fit", FITS)
def test_a_few_examples_suffice_for_unseen_rows(kind: str, fit: str) -> None:
    model = lived_in(kind)
    task = Task.classification("tone", ["no", "yes"])
    model.add_task(task, _tone_rows(range(8)), fit=fit, max_steps=8)
    unseen = _tone_rows(range(8, 40))
    answers = [task.labels[index] for index in _answers(model, "tone", unseen).argmax(dim=1).tolist()]
    assert sum(answer == row["label"] for answer, row in zip(answers, unseen, strict=True)) >= 0.7 * len(unseen)


@pytest.mark.parametrize("fit", FITS)
def test_predicted_numbers_follow_the_targets_in_their_units(fit: str) -> None:
    def rows(count: int, seed: int) -> Rows:
        generator = random.Random(seed)
        chosen = [[generator.choice(["good", "bad"]) for _ in range(6)] for _ in range(count)]
        return [{"text": " ".join(words), "label": 1000.0 + 50 * words.count("good")} for words in chosen]

    model = lived_in("bert")
    model.add_task(Task.regression("price"), rows(16, seed=1), fit=fit, max_steps=8)
    unseen = rows(40, seed=2)
    targets = torch.tensor([row["label"] for row in unseen])
    found = _answers(model, "price", unseen)[:, 0]
    assert float(torch.corrcoef(torch.stack([found, targets]))[0, 1]) > 0.6
    assert float((found - targets).abs().mean()) < float((targets - targets.mean()).abs().mean())


def _text_loss(model: HyperAdapterModel, name: str, rows: Rows) -> float:
    task_id = model.task_id(name)
    batch = model.collator([Example(task_id, row["text"], None, row["label"]) for row in rows])
    with torch.no_grad():
        return float(model(**batch).losses.task)


@pytest.mark.parametrize("fit", ["prototype", "adapter", "shared"])
def test_the_loss_on_the_examples_of_a_text_task_falls(fit: str) -> None:
    rows = [{"text": f"w{n} w{n + 7}", "label": "red blue"} for n in range(8)]
    start, model = lived_in("t5"), lived_in("t5")
    task = Task.text_to_text("write")
    start.add_task(task, rows, fit="none")
    report = model.add_task(task, rows, fit=fit, max_steps=12)
    assert report.steps > 0
    assert _text_loss(model, "write", rows) < 0.97 * _text_loss(start, "write", rows)


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_that_does_not_help_left_out_examples_takes_no_steps(fit: str) -> None:
    rows = [{"text": "w1 w2", "label": label} for label in ("no", "yes") * 4]
    assert lived_in("bert").add_task(Task(name="coin"), rows, fit=fit, max_steps=8).steps == 0


def test_a_new_task_claims_the_examples_it_was_made_from() -> None:
    model = lived_in("bert")
    rows = _tone_rows(range(6))
    model.add_task(Task(name="tone"), rows, fit="none")
    assert [routing.task for routing in model.route([row["text"] for row in rows])] == ["tone"] * len(rows)


TWO = Task.classification("two", ["a", "b"])


def test_a_head_from_label_means_answers_with_the_nearest_mean() -> None:
    """Means (1, 0) and (6, 0); with the third label's mean (1, 8) the middle of all is not between any two."""
    pooled = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 0.0], [7.0, 0.0], [1.0, 7.0], [1.0, 9.0]])
    task = Task.classification("three", ["a", "b", "c"])
    head = make_head(task, pooled, [0, 0, 1, 1, 2, 2], range(6), fitted=False)
    assert head is not None
    means = torch.tensor([[1.0, 0.0], [6.0, 0.0], [1.0, 8.0]])
    points = torch.tensor([[3.4, 0.0], [3.6, 0.0], [1.0, 3.9], [1.0, 4.1], [6.0, 3.0], [-5.0, -5.0], [4.0, 9.0]])
    logits = points @ head.weight.T + head.bias
    distances = (points[:, None] - means).square().sum(dim=2)
    assert logits.argmax(1).tolist() == distances.argmin(1).tolist() == [0, 1, 0, 2, 1, 0, 2]
    ratio = (logits[:, :1] - logits[:, 1:]) / (distances[:, 1:] - distances[:, :1])
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=0)
    assert (head.target_mean, head.target_std) == (0.0, 1.0)


def test_a_head_has_the_numbers_worked_out_by_hand() -> None:
    """Means 1 and 4, middle 2.5, offsets -1.5 and 1.5, spread (1 + 1) / (3 - 2), s its inverse: 1 / 2."""
    head = make_head(TWO, torch.tensor([[0.0], [2.0], [4.0]]), [0, 0, 1], range(3), fitted=False)
    assert head is not None
    assert head.weight[:, 0].tolist() == pytest.approx([-0.75, 0.75])
    assert head.bias.tolist() == pytest.approx([0.75 * 2.5 - 0.5625, -0.75 * 2.5 - 0.5625])


def test_a_head_has_the_scale_under_which_left_out_rows_are_likeliest() -> None:
    """Means 1.75 and 6, middle 3.875, spread (8.75 + 14) / (8 - 2); one row of each label lies nearer to the other."""
    first, second = [0.0, 1.0, 2.0, 4.0], [3.0, 6.0, 7.0, 8.0]
    spread = 22.75 / 6

    def likelihood(scale: float) -> float:
        total = 0.0
        for own, other in ((first, second), (second, first)):
            for row in own:
                near = (row - (sum(own) - row) / 3) ** 2
                far = (row - sum(other) / 4) ** 2
                total -= float(np.logaddexp(0.0, scale / spread * (near - far) / 2))
        return total

    found = sorted(MEAN_SCALES, key=likelihood)
    assert min(MEAN_SCALES) < found[-1] < max(MEAN_SCALES)
    head = make_head(TWO, torch.tensor([[row] for row in first + second]), [0] * 4 + [1] * 4, range(8), fitted=False)
    assert head is not None
    scale = found[-1] / spread
    assert head.weight[:, 0].tolist() == pytest.approx([-2.125 * scale, 2.125 * scale], rel=1e-5)
    assert head.bias.tolist() == pytest.approx([scale * (2.125 * x - 2.125**2 / 2) for x in (3.875, -3.875)], rel=1e-5)


def test_a_head_is_made_from_the_given_rows_only() -> None:
    pooled = torch.tensor([[0.0], [2.0], [3.0], [5.0], [100.0], [-50.0]])
    some = make_head(TWO, pooled, [0, 0, 1, 1, 0, 1], [0, 1, 2, 3])
    alone = make_head(TWO, pooled[:4], [0, 0, 1, 1], range(4))
    assert some is not None
    assert alone is not None
    assert torch.equal(some.weight, alone.weight)
    assert torch.equal(some.bias, alone.bias)


def test_one_row_of_each_label_does_not_make_a_head_that_is_certain_of_everything() -> None:
    """Means 0 and 1: a row at 0.55 is a little nearer to the second."""
    head = make_head(TWO, torch.tensor([[0.0], [1.0]]), [0, 1], range(2))
    assert head is not None
    likely = (torch.tensor([0.55]) @ head.weight.T + head.bias).softmax(dim=0)
    assert 0.5 < float(likely[1]) < 0.99


def test_a_number_is_predicted_by_ridge_regression_on_standardised_targets() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(9, 3, generator=generator)
    targets = (200 + 30 * features @ torch.tensor([1.0, -2.0, 0.5]) + 40 * torch.randn(9, generator=generator)).tolist()
    head = make_head(Task.regression("price"), features, targets, range(9))
    assert head is not None
    mean, std = float(np.mean(targets)), float(np.std(targets))
    assert (head.target_mean, head.target_std) == (pytest.approx(mean, rel=1e-5), pytest.approx(std, rel=1e-5))
    x, y = features.double().numpy(), (np.array(targets) - mean) / std

    def ridge(rows: list[int], strength: float) -> tuple[np.ndarray, float]:
        centre = x[rows].mean(axis=0)
        centred = x[rows] - centre
        weight = np.linalg.solve(centred.T @ centred + strength * np.eye(3), centred.T @ (y[rows] - y[rows].mean()))
        return weight, float(y[rows].mean() - weight @ centre)

    def left_out_error(strength: float) -> float:
        found = [(ridge([other for other in range(9) if other != row], strength), row) for row in range(9)]
        return sum((x[row] @ weight + bias - y[row]) ** 2 for (weight, bias), row in found)

    weight, bias = ridge(list(range(9)), min(RIDGE_STRENGTHS, key=left_out_error))
    assert head.weight[0].tolist() == pytest.approx(weight.tolist(), rel=1e-3, abs=1e-5)
    assert head.bias.tolist() == pytest.approx([bias], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("targets", [[5.0], [5.0, 5.0, 5.0], [1.0, 9.0]])
@pytest.mark.filterwarnings("error")
def test_a_number_can_be_predicted_from_one_example_two_or_equal_ones(targets: list[float]) -> None:
    model = lived_in("bert")
    rows = [{"text": f"w{n}", "label": target} for n, target in enumerate(targets)]
    model.add_task(Task.regression("new"), rows, fit="none")
    found = _answers(model, "new", rows)
    assert found.isfinite().all()
    assert min(targets) - 1 < float(found.min()) <= float(found.max()) < max(targets) + 1


# 5. Subsets, repetition, and what is not to be touched


@pytest.mark.parametrize("count", [1, 2, 5])
def test_k_per_label_takes_so_many_rows_of_each_label_drawn_by_the_seed(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[tuple[str, Any]]] = []

    class Recording(FitExamples):
        def __init__(self, model: HyperAdapterModel, task: Task, examples: Any) -> None:
            taken.append([(example.text, example.target) for example in examples])
            super().__init__(model, task, examples)

    monkeypatch.setattr(fewshot, "FitExamples", Recording)
    task = Task.classification("new", ["a", "b", "c"])
    rows = [{"text": f"w{n} w{m}", "label": label} for m, label in enumerate("abc") for n in range(6 + m)]
    for seed in (0, 0, 1):
        report = lived_in("bert").add_task(task, rows, fit="none", k_per_label=count, seed=seed)
        assert report.examples == 3 * count
    assert all(sorted(target for _, target in found) == sorted([0, 1, 2] * count) for found in taken)
    assert all(len(set(found)) == 3 * count for found in taken)
    assert taken[0] == taken[1] != taken[2]


def test_k_per_label_takes_so_many_rows_in_all_where_there_are_no_labels() -> None:
    rows = [{"text": f"w{n}", "label": float(n)} for n in range(9)]
    assert lived_in("bert").add_task(Task.regression("new"), rows, fit="none", k_per_label=4).examples == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_the_same_call_gives_the_same_model_bit_for_bit(kind: str, fit: str) -> None:
    states = []
    for noise in (1, 2):
        model = lived_in(kind, centroids_per_task=2)
        torch.manual_seed(noise)
        np.random.seed(noise)
        random.seed(noise)
        add_new(model, fit=fit, init="random", seed=3, k_per_label=2)
        states.append(dict(model.adapter_state_dict()))
    assert_equal(states[1], states[0])


def test_another_seed_gives_another_random_start() -> None:
    found = []
    for seed in (0, 1):
        model = lived_in("bert")
        add_new(model, fit="none", init="random", seed=seed)
        found.append(model.method.prototypes.weight[3].detach())
    assert not torch.equal(found[0], found[1])
    assert float(found[0].norm()) == pytest.approx(
        float(lived_in("bert").method.prototypes.weight.detach().norm(dim=1).mean()), rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_random_numbers_of_the_caller_are_not_touched(kind: str, fit: str) -> None:
    model = lived_in(kind)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    add_new(model, fit=fit, init="random")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["train", "eval", "as made"])
@pytest.mark.parametrize("goes_wrong", [False, True])
def test_the_mode_of_every_module_is_not_touched(kind: str, mode: str, goes_wrong: bool) -> None:
    tasks = lived_in(kind).tasks
    model = HyperAdapterModel(tiny_backbone(kind), tasks, ModelConfig(adapter_dim=4))
    model.tokenizer = tiny_tokenizer()
    if mode != "as made":
        model.train(mode == "train")
    before = {name: module.training for name, module in model.named_modules()}
    if goes_wrong:
        with pytest.raises(DataError):
            model.add_task(NEW, [{"text": 3, "label": "bad"}])
    else:
        add_new(model, fit="none")
    after = {name: module.training for name, module in model.named_modules()}
    assert {name for name in before if before[name] != after[name]} == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_a_fit_leaves_no_gradients_and_trains_what_was_trained(kind: str, fit: str) -> None:
    model = lived_in(kind)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_task(NEW, NEW_ROWS, fit=fit, max_steps=4)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in trained} == trained
    assert all(flag for name, flag in after.items() if not name.startswith("backbone."))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fit", ["prototype", "adapter"])
def test_a_task_can_be_added_where_gradients_are_switched_off(context: Callable[[], Any], fit: str) -> None:
    model, expected = lived_in("bert"), lived_in("bert")
    add_new(expected, fit=fit)
    with context():
        add_new(model, fit=fit)
    Everything(expected).assert_same(model)
    model.training_loss(make_batch("bert")).total.backward()


# 6. Removing, renaming, refitting


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_task_cannot_be_removed(kind: str) -> None:
    model = lived_in(kind)
    model.remove_task("size")
    model.remove_task("colour")
    before = Everything(model)
    with pytest.raises(TaskError, match=r"'mood' is the only task.*add another before removing it"):
        model.remove_task("mood")
    before.assert_same(model)


WRONG_NAMES = ["", " ", "a/b", "a\\b", "..", "tab\tbed", "line\nbreak", "nul\0", "right\u202eleft", " edge", "x" * 101]


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_wrong_name_is_refused(name: str) -> None:
    model = lived_in("bert")
    before = Everything(model)
    with pytest.raises(TaskError, match=r"name: (expected 1 to 100 characters|must not contain path separators)"):
        model.rename_task("mood", name)
    with pytest.raises(TaskError, match=r"name: (expected 1 to 100 characters|must not contain path separators)"):
        Task.classification(name, ["a", "b"])
    before.assert_same(model)


@pytest.mark.parametrize("name", ["mood", "size"])
def test_renaming_gives_a_free_name_only(name: str) -> None:
    model = lived_in("bert")
    before = Everything(model)
    if name == "mood":
        model.rename_task("mood", "mood")
    else:
        with pytest.raises(TaskError, match="task names must be different from each other, found 'size' 2 times"):
            model.rename_task("mood", name)
    before.assert_same(model)


def test_unknown_tasks_are_named_with_the_nearest_known_one() -> None:
    model = lived_in("bert")
    before = Everything(model)
    calls: list[Callable[[], Any]] = [
        lambda: model.remove_task("moood"),
        lambda: model.rename_task("moood", "other"),
        lambda: model.refit_task("moood", NEW_ROWS),
        lambda: model.task_id("moood"),
    ]
    for call in calls:
        with pytest.raises(
            TaskError, match=r"Unknown task 'moood'\. Did you mean 'mood'\? Known: colour, mood, size\."
        ):
            call()
    before.assert_same(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_a_refitted_task_keeps_its_id_and_has_its_own_adapter_if_that_was_fitted(kind: str, fit: str) -> None:
    model = lived_in(kind, own=("size", "mood"))
    tasks = model.tasks
    before = [tensor.clone() for tensor in model.method.adapters(torch.tensor([1])).values()]
    report = refit(model, "size", fit=fit)
    assert (report.task, report.init) == ("size", "current")
    assert model.tasks == tasks
    assert model.task_id("size") == 1
    assert sorted(model.method.own_adapters) == (["1", "2"] if fit in ("adapter", "none") else ["2"])
    after = model.method.adapters(torch.tensor([1])).values()
    if fit == "none":
        assert all(map(torch.equal, after, before))
    if fit == "prototype":
        generated = model.method.hypernetwork(model.method.prototypes(torch.tensor([1])))
        assert all(map(torch.equal, after, generated.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_refitting_from_where_a_task_is_changes_neither_prototype_nor_adapter_in_zero_steps(kind: str) -> None:
    model = lived_in(kind, own=())
    prototype = model.method.prototypes.weight[1].detach().clone()
    before = [tensor.clone() for tensor in model.method.adapters(torch.tensor([1])).values()]
    refit(model, "size", fit="none")
    assert torch.equal(model.method.prototypes.weight[1], prototype)
    assert all(map(torch.equal, model.method.adapters(torch.tensor([1])).values(), before))


def _started(model: HyperAdapterModel, fit: str, weights: AdapterWeights) -> AdapterWeights:
    """What an adapter of its own starts as: an encoder's with less effect than the one it is taken from."""
    strength = DAMPING if fit == "adapter" and not model.text_to_text else 1.0
    up = {name: strength * weights[name] for name in ("up_weight", "up_bias")}
    return AdapterWeights({**weights, **up})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", ["none", "adapter"])
def test_a_start_from_a_task_with_its_own_adapter_starts_from_that_adapter(kind: str, fit: str) -> None:
    model = lived_in(kind, own=KNOWN)
    report = add_new(model, fit=fit, init="nearest", max_steps=0)
    nearest = model.task_id(report.neighbours[0].task)
    assert torch.equal(model.method.prototypes.weight[3], model.method.prototypes.weight[nearest])
    own, started = (model.method.own_adapters[str(task_id)] for task_id in (nearest, 3))
    assert all(map(torch.equal, started().values(), _started(model, fit, own()).values()))
    assert {parameter.data_ptr() for parameter in own.parameters()}.isdisjoint(
        p.data_ptr() for p in started.parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_zero_steps_give_the_adapter_of_the_nearest_task(kind: str, fit: str) -> None:
    model = lived_in(kind, own=())
    report = add_new(model, fit=fit, max_steps=0)
    nearest = model.task_id(report.neighbours[0].task)
    assert (report.steps, report.stopping) == (0, "none")
    assert list(model.method.own_adapters) == (["3"] if fit == "adapter" else [])
    expected = _started(model, fit, model.method.adapters(torch.tensor([nearest])))
    for name, found in model.method.adapters(torch.tensor([3])).items():
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("init", ["mixture", "mean_instance"])
def test_a_prototype_starts_where_the_choice_says(init: str) -> None:
    model = lived_in("bert")
    weight = model.method.prototypes.weight.detach().clone()
    similarity = _similarities(model, NEW_ROWS)
    texts = [Example(None, row["text"]) for row in NEW_ROWS]
    instances = model.instance_vectors(**model.collator.inputs(texts)).detach()
    add_new(model, fit="none", init=init)
    if init == "mixture":
        shares = np.exp(np.array([similarity[name] for name in KNOWN]) / model.adapter_config.temperature)
        expected = torch.from_numpy(shares / shares.sum()).float() @ weight
    else:
        middle = (instances / instances.norm(dim=1, keepdim=True)).mean(dim=0)
        expected = middle / middle.norm() * weight.norm(dim=1).mean()
    torch.testing.assert_close(model.method.prototypes.weight[3].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", [*INITS, "current"])
def test_the_only_task_of_a_model_can_be_fitted_anew(init: str) -> None:
    model = lived_in("bert")
    model.remove_task("size")
    model.remove_task("colour")
    report = refit(model, "mood", init=init)
    assert report.neighbours == ()
    assert [name for name, value in model.adapter_state_dict().items() if value.isnan().any()] == []


# 7. What is wrong is refused, and nothing has changed


PAIR = Task.classification("pair", ["a", "b"], fields=["text", "text_pair"])
GOOD = [{"text": "w1", "label": "a"}, {"text": "w2", "label": "b"}]
Wrong = tuple[Task, Any, dict[str, Any], type[HyperAdaptersError], str]
WRONG: dict[str, Wrong] = {
    "name taken": (Task.classification("mood", ["a", "b"]), GOOD, {}, TaskError, "task 'mood' exists; choose another"),
    "one label": (Task(name="new"), GOOD[:1] * 3, {}, DataError, "needs at least two labels, found only 'a'"),
    "unknown label": (
        TWO,
        [*GOOD, {"text": "w", "label": "aa"}],
        {},
        DataError,
        r"example 3: unknown label 'aa' of task 'two'\. Did you mean 'a'\?",
    ),
    "label without examples": (
        TWO,
        GOOD[:1],
        {},
        DataError,
        r"no example of label\(s\) b; expected at least one of each",
    ),
    "no examples": (TWO, [], {}, DataError, "task 'two': no examples; expected at least one of each label"),
    "no numbers": (Task.regression("new"), [], {}, DataError, "task 'new': no examples; expected at least one"),
    "examples are a text": (TWO, "w1 w2", {}, DataError, "expected a list or another iterable of inputs, found str"),
    "examples are one mapping": (
        TWO,
        GOOD[0],
        {},
        DataError,
        "expected a list or another iterable of inputs, found dict",
    ),
    "example is a text": (TWO, ["w1"], {}, DataError, "example 1: expected a mapping with text and label, found 'w1'"),
    "no text": (
        TWO,
        [{"txt": "w", "label": "a"}],
        {},
        DataError,
        r"example 1: no column 'text'\. Did you mean 'txt'\?",
    ),
    "no label": (TWO, [{"text": "w"}], {}, DataError, "example 1: no column 'label'"),
    "no second text": (PAIR, GOOD, {}, DataError, "example 1: no column 'text_pair'"),
    "text is a number": (TWO, [{"text": 3, "label": "a"}], {}, DataError, "expected a string in 'text', found 3"),
    "label is nothing": (TWO, [{"text": "w", "label": None}], {}, DataError, "expected a label, found None"),
    "label is no text": (
        Task(name="new"),
        [*GOOD, {"text": "w", "label": "half \ud83d"}],
        {},
        DataError,
        "example 3: .*not valid Unicode",
    ),
    "not a number": (
        Task.regression("new"),
        [{"text": "w", "label": "many"}],
        {},
        DataError,
        "expected a number as target, found 'many'",
    ),
    "not finite": (Task.regression("new"), [{"text": "w", "label": "nan"}], {}, DataError, "expected a finite number"),
    "unknown fit": (TWO, GOOD, {"fit": "adaptr"}, TaskError, r"Unknown fit 'adaptr'\. Did you mean 'adapter'\?"),
    "unknown init": (TWO, GOOD, {"init": "neares"}, TaskError, r"Unknown init 'neares'\. Did you mean 'nearest'\?"),
    "nothing is current": (TWO, GOOD, {"init": "current"}, TaskError, "Unknown init 'current'"),
    "none of each label": (
        TWO,
        GOOD,
        {"k_per_label": 0},
        DataError,
        "k_per_label: expected an integer of 1 or more, found 0",
    ),
    "fewer than no steps": (TWO, GOOD, {"max_steps": -3}, HyperAdaptersError, "max_steps"),
    "f1 of three labels": (
        Task(name="new", metrics=("f1",)),
        [*GOOD, {"text": "w", "label": "c"}],
        {},
        DataError,
        "f1 requires two labels, found 3",
    ),
    "text for heads": (
        Task.text_to_text("new"),
        [{"text": "w", "label": "w"}],
        {},
        TaskError,
        "'new' is text-to-text, which needs an encoder-decoder",
    ),
}


@pytest.mark.parametrize(("task", "examples", "options", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_task_or_example_is_refused_and_nothing_has_changed(
    task: Task, examples: Any, options: dict[str, Any], error: type[HyperAdaptersError], message: str
) -> None:
    model = lived_in("bert")
    before, revision = Everything(model), model.task_table.revision
    with pytest.raises(error, match=message):
        model.add_task(task, examples, **options)
    before.assert_same(model)
    assert model.task_table.revision == revision


@pytest.mark.parametrize(
    ("examples", "options", "error", "message"),
    [
        ([], {}, DataError, "task 'mood': no examples"),
        ([{"text": "w", "label": "good"}], {}, DataError, r"no example of label\(s\) bad"),
        ([{"text": "w", "label": "god"}], {}, DataError, r"unknown label 'god' of task 'mood'\. Did you mean 'good'"),
        (rows_of(Task.classification("mood", ["bad", "good"])), {"fit": "all"}, TaskError, "Unknown fit 'all'"),
        (rows_of(Task.classification("mood", ["bad", "good"])), {"init": "curent"}, TaskError, "mean 'current'"),
    ],
)
def test_a_wrong_refit_is_refused_and_nothing_has_changed(
    examples: Rows, options: dict[str, Any], error: type[HyperAdaptersError], message: str
) -> None:
    model = lived_in("bert")
    before = Everything(model)
    with pytest.raises(error, match=message):
        model.refit_task("mood", examples, **options)
    before.assert_same(model)


@pytest.mark.parametrize(
    ("label", "message"),
    [(3, "example 1: expected a string as target, found 3"), ("half \ud83d", "example 1: .*not valid Unicode")],
)
def test_a_wrong_target_text_is_refused_and_nothing_has_changed(label: Any, message: str) -> None:
    model = lived_in("t5")
    before = Everything(model)
    with pytest.raises(DataError, match=message):
        model.add_task(Task.text_to_text("new"), [{"text": "w1", "label": label}])
    before.assert_same(model)


# 8. Saving a changed model is all or nothing


def _whole(folder: Path, states: list[Everything]) -> int:
    """Which of the states a folder loads as."""
    loaded = HyperAdapterModel.from_pretrained(folder, backbone=tiny_backbone("bert"))
    (found,) = [index for index, state in enumerate(states) if state.tasks == loaded.tasks]
    states[found].assert_same(loaded)
    return found


def _patch_writes(patch: pytest.MonkeyPatch, fails_at: int, fail: Callable[[], Any]) -> list[str]:
    """Make the n-th of the calls by which files are written fail; returns the names of those that were made."""
    calls: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == fails_at:
                fail()
            return real(*arguments, **options)

        patch.setattr(owner, name, call)

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "open")):
        counted(owner, name)
    return calls


def _saved_then_changed(folder: Path, change: Change) -> tuple[HyperAdapterModel, list[Everything]]:
    model = lived_in("bert")
    model.save_pretrained(folder)
    old = Everything(model)
    change(model)
    return model, [old, Everything(model)]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new_tasks(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        raise error("stopped")

    model, states = _saved_then_changed(tmp_path / "run", lambda m: add_new(m, fit="none"))
    found = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        _copy(tmp_path / "run", folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = _patch_writes(patch, step, fail)
            with suppress(OutputError, OSError, KeyboardInterrupt):
                model.save_pretrained(folder)
        found.append(_whole(folder, states))
        if len(calls) < step:
            break
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 1
    assert found.count(0) >= 5


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def test_old_weights_that_cannot_be_removed_are_no_failure_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, states = _saved_then_changed(tmp_path, lambda m: m.remove_task("size"))
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError("in use")
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        try:
            model.save_pretrained(tmp_path)
        except OutputError as error:
            assert "in use" in str(error)  # noqa: PT017
    assert _whole(tmp_path, states) == 1
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # the tokenizer was set by hand


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked to be killed")
def test_a_process_killed_anywhere_in_a_save_leaves_the_old_or_the_new_tasks(tmp_path: Path) -> None:
    model, states = _saved_then_changed(tmp_path / "run", lambda m: add_new(m, fit="adapter", max_steps=0))
    found = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        _copy(tmp_path / "run", folder)
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                _patch_writes(patch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
                model.save_pretrained(folder)
                os._exit(0)
        _, status = os.waitpid(child, 0)
        found.append(_whole(folder, states))
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert found == sorted(found)
    assert found.count(0) >= 5
    assert found[-1] == 1


# 10. Stopped in the middle


class StoppedError(Exception):
    pass


def _stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, step: int) -> list[str]:
    """Make the n-th call of a method raise; returns a list with an entry for each call."""
    calls: list[str] = []
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == step:
            raise StoppedError
        return real(*arguments, **options)

    patch.setattr(owner, name, call)
    return calls


def _assert_unchanged_wherever_it_stops(kind: str, change: Change, owner: Any, name: str, most: int = 100) -> None:
    model = lived_in(kind)
    before, revision = Everything(model), model.task_table.revision
    answers = outputs(model, kind, KNOWN)
    for step in range(1, most):
        with pytest.MonkeyPatch.context() as patch:
            calls = _stop_at(patch, owner, name, step)
            try:
                change(model)
            except StoppedError:
                before.assert_same(model)
                assert model.task_table.revision == revision
            else:
                assert len(calls) < step
                break
            assert_equal(outputs(model, kind, KNOWN), answers)
    assert step > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_a_fit_that_stops_anywhere_leaves_the_model_as_it_was(kind: str, fit: str) -> None:
    def change(model: HyperAdapterModel) -> None:
        model.add_task(NEW, NEW_ROWS, fit=fit, max_steps=2)

    _assert_unchanged_wherever_it_stops(
        kind, change, HyperAdapterModel, "forward_with_adapter" if fit != "none" else "instance_vectors"
    )


@pytest.mark.parametrize("fit", ["adapter", "shared"])
def test_a_refit_that_stops_anywhere_leaves_the_model_as_it_was(fit: str) -> None:
    def change(model: HyperAdapterModel) -> None:
        refit(model, "mood", fit=fit)

    _assert_unchanged_wherever_it_stops("bert", change, HyperAdapterModel, "forward_with_adapter")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(heads, "_concatenated"), (OwnAdapter, "__init__"), (OwnAdapter, "forward")],
)
def test_tasks_that_cannot_be_put_in_place_leave_the_model_as_it_was(owner: Any, name: str) -> None:
    """As when the memory of an accelerator runs out."""
    _assert_unchanged_wherever_it_stops("bert", lambda m: add_new(m, fit="adapter", max_steps=0), owner, name)
    _assert_unchanged_wherever_it_stops("bert", lambda m: m.remove_task("colour"), owner, name)
