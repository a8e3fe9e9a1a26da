"""Fits that come after training, with one label, thousands of them, one row of each, and constant targets."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_backbone, tiny_backbone, tiny_tokenizer

import hyperadapters
from hyperadapters.config import ModelConfig, Recipe, Task, parse
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.heads.new_heads import MEAN_SCALES, _label_means, _mean_head, make_head, mean_head
from hyperadapters.heads.regression import MANY_LOGITS, RIDGE_STRENGTHS, few_shot_probe, logistic_regression
from hyperadapters.heads.task_heads import Head, TaskHeads
from hyperadapters.heads.trained_heads import fit_feature_head
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.probes import linear_probe
from hyperadapters.training.run import train
from hyperadapters.training.text_heads import fit_text_heads

SIZES: dict[str, Any] = {"adapter_dim": 2, "prototype_dim": 8, "hidden_dim": 8}
LARGE = [pytest.param(*counts, marks=pytest.mark.slow) for counts in ((400, 2), (2000, 1), (2000, 2))]
COUNTS = [(2, 1), (2, 600), (77, 1), (77, 20), (400, 1), (400, 3), *LARGE]


def clusters(num_labels: int, rows: int, width: int = 12) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Rows [N, width] around a point of their label's, and the labels."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_labels), rows)
    points = generator.normal(size=(num_labels, width))
    return points[labels] + 0.01 * generator.normal(size=(len(labels), width)), labels.tolist()


def labelled(num_labels: int) -> Task:
    return Task.classification("many", [f"l{index}" for index in range(num_labels)])


@pytest.mark.parametrize(("num_labels", "rows"), COUNTS)
def test_a_logistic_regression_knows_all_labels(num_labels: int, rows: int) -> None:
    inputs, labels = clusters(num_labels, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logistic_regression(inputs, labels)
    assert found.classes_.tolist() == list(range(num_labels))
    assert np.isfinite(found.coef_).all()


def test_a_rare_label_among_many_rows_has_rows_on_both_sides_of_the_split() -> None:
    inputs, labels = clusters(2, 1)
    inputs, labels = np.repeat(inputs, [1100, 2], axis=0), [0] * 1100 + [1] * 2
    inputs += 0.01 * np.random.default_rng(1).normal(size=inputs.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn warns where a score is not a number
        assert logistic_regression(inputs, labels).predict(inputs).tolist() == labels


@pytest.mark.slow
def test_above_a_size_the_strength_is_fixed() -> None:
    inputs, labels = clusters(2000, 2)
    assert len(inputs) * 2000 > MANY_LOGITS
    assert logistic_regression(inputs, labels).C == 10.0


@pytest.mark.parametrize("rows", [1, 5])
def test_a_probe_of_one_label_answers_with_it(rows: int) -> None:
    assert few_shot_probe(np.ones((rows, 3)), [1] * rows, np.zeros((2, 3))) == [1, 1]


@pytest.mark.parametrize("targets", [[1, 1, 1], [0.1, 0.1, 0.1], [2.5]], ids=["one label", "constant", "one row"])
def test_a_linear_probe_of_constant_targets_answers_with_them(targets: list[Any]) -> None:
    task = labelled(2) if isinstance(targets[0], int) else Task.regression("size")
    model = HyperAdapterModel(tiny_backbone("bert"), [task], parse(ModelConfig, {"preset": "paper", **SIZES}))
    model.tokenizer = tiny_tokenizer()
    rows = [Example(0, f"w{row} red", None, target) for row, target in enumerate(targets)]
    found = linear_probe(model, TaskData(task, {"train": rows, "validation": rows, "test": rows}))
    assert found == ({"accuracy": 1.0} if task.labels else {"pearson": 0.0})


@pytest.mark.parametrize(("num_labels", "rows"), COUNTS)
def test_a_head_of_few_examples_knows_all_labels(num_labels: int, rows: int) -> None:
    inputs, labels = clusters(num_labels, rows, 24)
    head = make_head(labelled(num_labels), torch.tensor(inputs).float(), labels, range(len(labels)))
    assert head is not None
    logits = torch.tensor(inputs).float() @ head.weight.T + head.bias
    assert logits.isfinite().all()
    assert (logits.argmax(dim=1) == torch.tensor(labels)).double().mean() > 0.95


def test_the_scale_of_a_head_is_the_one_under_which_rows_are_likely_without_themselves() -> None:
    """All at once, as `mean_head` does it, against one row after the other, as its docstring says it."""
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(4)
    inputs = (torch.randn(3, 5)[labels] + 0.8 * torch.randn(12, 5)).double()
    means, _ = _label_means(inputs, labels, 3)
    base = 1.0 / float((inputs - means[labels]).square().sum() / 9)
    likelihoods = dict.fromkeys(MEAN_SCALES, 0.0)
    for row, label in enumerate(labels.tolist()):
        others = torch.arange(12) != row
        without, _ = _label_means(inputs[others], labels[others], 3)
        for scale in MEAN_SCALES:
            head = _mean_head(without, scale * base)
            likelihoods[scale] += float((head.weight @ inputs[row] + head.bias).log_softmax(dim=0)[label])
    best = max(likelihoods, key=likelihoods.__getitem__)
    assert best not in (MEAN_SCALES[0], MEAN_SCALES[-1])
    torch.testing.assert_close(mean_head(inputs, labels, 3).weight, _mean_head(means, best * base).weight)


@pytest.mark.parametrize("targets", [[0.1] * 3, [1e9] * 7, [3.7]])
def test_constant_targets_are_learned_at_the_scale_of_1(targets: list[float]) -> None:
    heads = TaskHeads(4, [Task.regression("size")])
    heads.set_target_scale(0, targets)
    assert float(heads.target_std) == 1.0
    assert float(heads.target_mean) == pytest.approx(targets[0], rel=1e-6)
    head = make_head(Task.regression("size"), torch.randn(len(targets), 4), targets, range(len(targets)))
    assert isinstance(head, Head)
    assert head.target_std == 1.0
    assert head.weight.isfinite().all()


def leave_one_out_error(inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], strength: float) -> float:
    total = 0.0
    for row in range(len(targets)):
        others = np.arange(len(targets)) != row
        x, y = inputs[others], targets[others]
        centred = x - x.mean(axis=0)
        gram = centred.T @ centred + strength * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, centred.T @ (y - y.mean()))
        total += float((inputs[row] - x.mean(axis=0)) @ weight + y.mean() - targets[row]) ** 2
    return total


@pytest.mark.parametrize(("signal", "expected"), [(0.0, max(RIDGE_STRENGTHS)), (1.0, min(RIDGE_STRENGTHS))])
def test_heads_of_trained_and_of_new_tasks_choose_from_the_same_strengths(signal: float, expected: float) -> None:
    """Targets that the inputs do not explain need the largest strength, and those without noise the smallest."""
    generator = np.random.default_rng(2)
    inputs = generator.normal(size=(30, 4))
    targets = signal * inputs @ np.array([1.0, -2.0, 0.5, 1.0]) + (1 - signal) * generator.normal(size=30)
    targets = (targets - targets.mean()) / targets.std()
    assert min(RIDGE_STRENGTHS, key=lambda strength: leave_one_out_error(inputs, targets, strength)) == expected
    centred = inputs - inputs.mean(axis=0)
    weight = np.linalg.solve(centred.T @ centred + expected * np.eye(4), centred.T @ targets)
    task, values = Task.regression("size"), targets.tolist()
    of_features = fit_feature_head(task, inputs, values)
    of_examples = make_head(task, torch.tensor(inputs), values, range(30))
    assert of_examples is not None
    for head in (of_features, of_examples):
        assert head.weight[0].tolist() == pytest.approx(weight.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_the_head_of_features_has_the_probabilities_of_the_logistic_regression(num_labels: int) -> None:
    generator = np.random.default_rng(0)
    inputs, labels = clusters(num_labels, 12)
    inputs = inputs + generator.normal(size=inputs.shape)
    head = fit_feature_head(labelled(num_labels), inputs, [float(label) for label in labels])
    assert head.bias.shape == (num_labels,)
    found = (torch.tensor(inputs) @ head.weight.double().T + head.bias.double()).softmax(dim=1)
    expected = logistic_regression(inputs, labels).predict_proba(inputs)
    # The weight is rounded to float32, and a probability moves by at most as much as the logits.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_linear_heads_are_fitted_in_one_module_only() -> None:
    package = Path(hyperadapters.__file__).parent
    fitting = [path for path in package.rglob("*.py") if "sklearn.linear_model" in path.read_text()]
    found = {path.relative_to(package).as_posix() for path in fitting}
    assert found == {"heads/regression.py", "quality/label_errors.py"}  # the latter fits no head of a model


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_text_heads_are_fitted_to_constant_numbers(num_rows: int) -> None:
    task = Task.regression("size")
    model = HyperAdapterModel(tiny_backbone("bert"), [task], parse(ModelConfig, {"preset": "plus", **SIZES}))
    model.tokenizer = tiny_tokenizer()
    rows = [Example(0, f"w{row} red", None, 0.1) for row in range(num_rows)]
    assert model.heads is not None
    model.heads.set_target_scale(0, [0.1] * num_rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_text_heads(model, rows, rows)
    assert all(value.isfinite().all() for value in model.heads.state_dict().values())


@pytest.mark.parametrize(("num_labels", "rows"), [(400, 3), pytest.param(2000, 1, marks=pytest.mark.slow)])
def test_a_task_of_many_labels_is_trained_to_the_end(num_labels: int, rows: int, tmp_path: Path) -> None:
    save_backbone(tmp_path / "bert")
    lines = [
        json.dumps({"text": f"w{label % 40} w{label // 40} w{row}", "label": f"label {label}"})
        for label in range(num_labels)
        for row in range(rows)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    path = {"train": f"{tmp_path}/rows.jsonl", "test": f"{tmp_path}/rows.jsonl"}
    recipe = {
        "backbone": str(tmp_path / "bert"),
        "model": {"preset": "plus", **SIZES},
        "data": {"max_length": 32},
        "training": {"max_steps": 1, "batch_size": 8},
        "tasks": [{"name": "many", "source": {"path": path}, "metrics": ["macro_f1"]}],
    }
    assert train(parse(Recipe, recipe), tmp_path / "run").metrics["tasks"]["many"]["test"]["macro_f1"] > 0
