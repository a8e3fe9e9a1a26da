"""Tasks from the descriptions or names of their labels alone, and what later examples change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model, make_plus_model, pair_examples, tiny_backbone

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.checkpoints.card import write_card
from hyperadapters.data.examples import label_examples
from hyperadapters.errors import DataError, TaskError
from hyperadapters.heads.name_weights import NAME_WEIGHTS, choose_name_weight
from hyperadapters.heads.new_heads import fit_new_head, left_out_fits
from hyperadapters.heads.regression import DEFAULT_PENALTY, MAX_GRADIENT, TEMPERATURES, TaskRows, head_losses
from hyperadapters.inference.routing import calibrate
from hyperadapters.serving.served_model import task_digests

DESCRIBED = Task.classification("colour", {"r": "red red red", "b": "blue blue blue"})
UNSEEN = ["red red w1", "blue w2 blue", "red w3 red", "w4 blue blue"]
ANSWERS = ["r", "b", "r", "b"]


@pytest.fixture(scope="module")
def base() -> HyperAdapterModel:
    """A model whose heads are fitted, and which is not changed by the tests."""
    model = make_plus_model()
    rows = pair_examples()
    model.fit_heads({task.name: [row for row in rows if row.task_id == i] for i, task in enumerate(model.tasks)})
    calibrate(model, rows, rows)
    return model


@pytest.fixture
def model(base: HyperAdapterModel) -> Any:
    """The same, without the tasks that a test has added."""
    yield base
    for task in base.tasks[3:]:
        base.remove_task(task.name)


def answers(model: HyperAdapterModel, task: str) -> list[Any]:
    return [prediction.answer for prediction in model.predict(UNSEEN, task=task)]


def test_a_task_without_examples_answers_by_its_descriptions(model: HyperAdapterModel) -> None:
    before = model.predict_proba(UNSEEN, task="mood")
    report = model.add_task(DESCRIBED)
    assert (report.examples, report.name_weight, report.fit) == (0, NAME_WEIGHTS[0], "head")
    assert answers(model, "colour") == ANSWERS
    assert (model.predict_proba(UNSEEN, task="mood") == before).all()


def test_names_take_the_place_of_descriptions(model: HyperAdapterModel) -> None:
    found = []
    for task in (Task.classification("t", ["red", "blue"]), Task.classification("t", {"red": "red", "blue": "blue"})):
        model.add_task(task)
        assert answers(model, "t") == ["red", "blue", "red", "blue"]
        found.append(model.predict_proba(UNSEEN, task="t"))
        model.remove_task("t")
    assert (found[0] == found[1]).all()


def test_examples_outweigh_descriptions_that_mislead(model: HyperAdapterModel) -> None:
    misled = Task.classification("misled", {"r": "blue blue", "b": "red red"})
    model.add_task(misled)
    assert answers(model, "misled") == ["b", "r", "b", "r"]
    rows = [{"text": f"{word} w{row}", "label": word[0]} for row in range(12) for word in ("red", "blue")]
    report = model.refit_task("misled", rows)
    assert report.name_weight == min(NAME_WEIGHTS)
    assert answers(model, "misled") == ANSWERS
    assert model.tasks[-1] == misled  # the descriptions are kept


def test_a_described_label_needs_no_example(model: HyperAdapterModel) -> None:
    few = [{"text": "red w6", "label": "r"}, {"text": "w7 red", "label": "r"}]
    model.add_task(DESCRIBED, few)
    assert answers(model, "colour") == ANSWERS
    with pytest.raises(DataError, match="no example of label"):
        model.add_task(Task.classification("named", ["r", "b"]), few)


def test_descriptions_count_as_one_text_in_routing(model: HyperAdapterModel) -> None:
    known = model.pha.thresholds.clone()
    model.add_task(DESCRIBED)
    densities = model.pha.densities
    assert densities is not None
    assert densities.counts[-1] == 1
    assert model.pha.thresholds[-1] == pytest.approx(float(known.mean()))
    model.refit_task("colour", [{"text": text, "label": label} for text, label in zip(UNSEEN, ANSWERS, strict=True)])
    assert densities.counts[-1] == len(UNSEEN)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Task.classification("new", ["0", "1"]), {}),  # names that say nothing
        (Task.classification("new", ["no", "yes"], fields=("text", "text_pair")), {}),
        (Task.classification("new", []), {}),
        (Task.multi_label("new", {"r": "red", "b": "blue"}), {}),
        (Task.regression("new"), {}),
        (DESCRIBED, {"fit": "none"}),
    ],
)
def test_other_tasks_and_fits_need_examples(base: HyperAdapterModel, task: Task, options: dict[str, Any]) -> None:
    revision = base.task_table.revision
    with pytest.raises(DataError, match="no examples; expected at least one"):
        base.add_task(task, **options)
    assert base.task_table.revision == revision


def test_other_models_and_refits_need_examples(model: HyperAdapterModel) -> None:
    with pytest.raises(DataError, match="no examples; expected at least one"):
        make_model("bert").add_task(DESCRIBED.model_copy(update={"name": "hue"}))
    model.add_task(DESCRIBED)
    with pytest.raises(DataError, match=r"no examples; expected at least one of each label$"):
        model.refit_task("colour", [])


def test_descriptions_are_kept_in_checkpoints_cards_and_digests(model: HyperAdapterModel, tmp_path: Path) -> None:
    model.add_task(DESCRIBED)
    logits = model.predict_proba(UNSEEN, task="colour")
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    loaded.tokenizer = model.tokenizer
    assert loaded.tasks[-1] == DESCRIBED
    assert (loaded.predict_proba(UNSEEN, task="colour") == logits).all()
    write_card(model, tmp_path, "run")
    assert "r (red red red), b (blue blue blue)" in (tmp_path / "README.md").read_text()
    before = task_digests(model)["colour"]
    states = model.task_table.states()
    states[-1].task = Task.classification("colour", {"r": "red red red", "b": "blue"})
    model.task_table.replace(states)
    assert task_digests(model)["colour"] != before


def rows_with_names(size: int, distance: float, seed: int) -> TaskRows:
    """Twelve random examples of two labels, which differ in their first element, and a name of each."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(14, size, generator=generator), [row % 2 for row in range(14)]
    inputs[:12, 0] += distance * torch.tensor(targets[:12])
    inputs[12:] = torch.randn(2, size, generator=generator)
    return TaskRows(Task.classification("t", ["no", "yes"]), torch.nn.functional.normalize(inputs), targets)


def losses_of_weights(rows: TaskRows) -> dict[float, dict[float, float]]:
    """The loss of left-out examples by the weight of names and the temperature."""
    found = {}
    for weight in NAME_WEIGHTS:
        fits = left_out_fits(rows._replace(weights=torch.tensor([1.0] * 12 + [weight] * 2)), 12, seed=1)
        found[weight] = {
            divisor: sum(float(head_losses(*fit, divisor).sum()) for fit in fits) for divisor in TEMPERATURES
        }
    return found


def best_weight(losses: dict[float, dict[float, float]], divisors: Sequence[float]) -> float:
    return min(losses, key=lambda weight: min(losses[weight][divisor] for divisor in divisors))


def test_the_weight_of_names_is_the_one_that_predicts_left_out_examples_best() -> None:
    """At the best temperature: here, heavy names make a head more certain, but it predicts better without them."""
    rows = rows_with_names(size=50, distance=3.0, seed=1)
    losses, found = losses_of_weights(rows), choose_name_weight(rows, 12, seed=1).name_weight
    assert found == best_weight(losses, [divisor for divisor in TEMPERATURES if divisor <= 1])
    assert found != best_weight(losses, [1.0])
    assert choose_name_weight(rows.subset(range(12)), 12).name_weight == NAME_WEIGHTS[0]  # there are no names


def test_names_that_mislead_are_not_forgiven_at_high_temperatures() -> None:
    rows = rows_with_names(size=4, distance=0.0, seed=24)
    losses, found = losses_of_weights(rows), choose_name_weight(rows, 12, seed=1).name_weight
    assert found == best_weight(losses, [divisor for divisor in TEMPERATURES if divisor <= 1])
    assert found < best_weight(losses, TEMPERATURES)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_weight_of_two_is_a_row_that_occurs_twice(metric: str) -> None:
    task = Task.classification("t", ["no", "yes"], metrics=(metric,))
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = [0, 1, 0, 1, 0, 1]
    weighted = fit_new_head(TaskRows(task, inputs, targets, torch.tensor([1.0] * 5 + [2.0])))
    twice = fit_new_head(TaskRows(task, torch.cat([inputs, inputs[5:]]), [*targets, 1]))
    # Two solutions of a strongly convex problem differ by at most their gradients over the penalty.
    torch.testing.assert_close(weighted.weight, twice.weight, rtol=0, atol=2 * MAX_GRADIENT / DEFAULT_PENALTY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"a": "x", "b": "x"}}, "descriptions must be different from each other"),
        ({"labels": {"a": "x", "b": " "}}, "descriptions must have letters"),
        ({"labels": {"a": "x", "b": 3}}, r"descriptions\.b: expected a valid string; found 3"),
        ({"labels": ["a", "b"], "descriptions": {"a": "x"}}, r"one text for each of \['a', 'b'\], found \['a'\]"),
        ({"labels": {"a": "x", "b": "y"}, "descriptions": {"a": "x", "b": "y"}}, "remove one of them"),
        ({"labels": {"a": "x", "b": "y"}, "fields": ("text", "text_pair")}, "only for .* tasks of single texts"),
    ],
)
def test_descriptions_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Task.classification("t", **options)


def test_descriptions_are_texts_of_their_labels() -> None:
    assert Task.classification("t", {" a": "one thing", "b": "another"}).label_texts == ["one thing", "another"]
    assert Task.classification("t", ["a_b", "c"]).label_texts == ["a b", "c"]
    assert Task.classification("t", ["1", "2"]).label_texts == []
    assert [row.text for row in label_examples([DESCRIBED])] == ["red red red", "blue blue blue"]
    assert Task(**DESCRIBED.model_dump()) == DESCRIBED
