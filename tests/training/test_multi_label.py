"""Multi-label tasks from training to answers: beside tasks of other kinds, stored, added, and written to files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    SIZES,
    make_method_model,
    make_plus_model,
    rows_of,
    save_backbone,
    stirred,
    tiny_backbone,
    tiny_tokenizer,
)
from tolerance import rounding

from hyperadapters import HyperAdapterModel, Predictor, Task, Trainer, TrainingArguments, load_recipe
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.errors import DataError, TaskError
from hyperadapters.inference.predict_files import predict_file
from hyperadapters.interop.task_files import classifier_config, write_task_files
from hyperadapters.training.calibration import calibrate_heads, calibrate_model
from hyperadapters.training.evaluation import evaluate
from hyperadapters.training.probes import linear_probe
from hyperadapters.training.run import train

TOPICS = Task.multi_label("topics", ["a", "b", "c"], metrics=("micro_f1", "macro_f1", "subset_accuracy"))
TASKS = [TOPICS, Task.classification("mood", ["bad", "good"]), Task.regression("size"), Task.multi_label("one", ["x"])]
DATA = {task.name: rows_of(task, 3) for task in TASKS}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "plus": {},
    "text_features": {"preset": "paper", "head_inputs": "text_features", "label_names": True},
}


def make(**settings: Any) -> HyperAdapterModel:
    return make_plus_model(TASKS, **settings)


def examples_of(model: HyperAdapterModel, tasks: list[Task] = TASKS) -> list[Example]:
    found = []
    for task_id, task in enumerate(model.tasks):
        for row in rows_of(task, 3) if task in tasks else []:
            label = row["label"]
            target = tuple(map(task.labels.index, label)) if task.is_multi_label else label
            target = task.labels.index(label) if task.kind == "classification" else target
            found.append(Example(task_id, row["text"], None, target))
    return found


@pytest.fixture(scope="module")
def calibrated() -> HyperAdapterModel:
    """A model with random weights whose thresholds differ from one half."""
    torch.manual_seed(0)
    model = stirred(make())
    calibrate_heads(model, examples_of(model))
    return model.eval()


# Training


@pytest.mark.parametrize("preset", PRESETS)
def test_such_tasks_are_learned_beside_tasks_of_other_kinds(preset: str, tmp_path: Path) -> None:
    model = make(**PRESETS[preset])
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, DATA, DATA, args)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_topics_micro_f1"] > 0.8
    assert found["eval_one_micro_f1"] > 0.8
    assert {name for name in found if name.startswith("eval_topics")} == {
        f"eval_topics_{metric}" for metric in TOPICS.metrics
    }
    assert model.heads is not None
    assert model.heads.temperature[0] != 1
    assert (model.heads.head(0).thresholds != 0.5).any()  # type: ignore[union-attr]
    assert model.heads.head(1).thresholds.eq(0.5).all()  # type: ignore[union-attr]


def test_a_recipe_trains_scores_and_describes_such_a_task(tmp_path: Path) -> None:
    save_backbone(tmp_path / "bert")
    rows = [{"text": row["text"], "label": ";".join(row["label"])} for row in rows_of(TOPICS, 6)]
    with (tmp_path / "topics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    held_out = {split: {"from": "train", "size": 12} for split in ("validation", "test")}
    task = {"name": "topics", "kind": "multi-label", "source": {"path": "topics.csv", "held_out": held_out}}
    recipe = {
        "backbone": str(tmp_path / "bert"),
        "model": {"preset": "plus", "feature_layer": 1, **SIZES},
        "data": {"max_length": 64},
        "training": {"max_steps": 4, "batch_size": 8, "eval_steps": 2},
        "tasks": [task],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    assert run.model.tasks == (Task.multi_label("topics", ["a", "b", "c"]),)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["tasks"]["topics"]["test"]) == {"micro_f1"}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| topics | multi-label | a, b, c | micro\\_f1 |" in card.replace("micro_f1", "micro\\_f1")


def test_training_without_validation_rows_keeps_one_half(tmp_path: Path) -> None:
    model = make()
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True)
    Trainer(model, DATA, args=args).train()
    assert model.heads is not None
    assert model.heads.thresholds.eq(0.5).all()


def test_rows_of_other_tasks_have_the_same_loss_and_logits_in_a_mixed_batch() -> None:
    model = stirred(make()).double()
    others = [
        row for row in examples_of(model) if model.tasks[row.task_id or 0].kind in ("classification", "regression")
    ]
    mixed = [*others[:5], *examples_of(model, [TOPICS])[:4]]
    losses = {}
    for name, rows in (("alone", mixed[:5]), ("mixed", mixed), ("sets", mixed[5:])):
        batch = model.collator(rows)
        output = model(**{**batch, "labels": batch["labels"].double()}, reduction="sum")
        losses[name] = output.losses.task
        if name == "mixed":
            logits = output.logits
    with torch.no_grad():
        ids = torch.tensor([row.task_id for row in mixed[:5]])
        alone = model(**model.collator.inputs(mixed[:5]), task_ids=ids).logits
    largest = float(alone[alone.isfinite()].abs().max())
    kept = alone.isfinite()
    found = logits[:5, : alone.shape[1]]
    torch.testing.assert_close(found[kept], alone[kept], rtol=0, atol=rounding(200, largest))
    torch.testing.assert_close(losses["mixed"], losses["alone"] + losses["sets"], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[1.0, 0.5, 0], [1, 0, 0]]), r"labels\[0\]: expected 3 zeros and ones.*task 'topics'"),
        (torch.tensor([[1.0, 0, 0], [2, 0, 0]]), r"labels\[1\]: expected an index from 0 to 1 for task 'mood'"),
        (torch.tensor([0.0, 1.0]), r"labels: expected a tensor of shape \(2, 3\), found shape \(2,\)"),
        (torch.zeros(2, 2), r"labels: expected a tensor of shape \(2, 3\)"),
    ],
)
def test_labels_of_another_form_are_refused(labels: torch.Tensor, message: str) -> None:
    model = make()
    with pytest.raises(TaskError, match=message):
        model(torch.ones(2, 3, dtype=torch.long), task_ids=torch.tensor([0, 1]), labels=labels)


# Answers


def test_an_answer_has_the_labels_whose_probability_exceeds_their_threshold(calibrated: HyperAdapterModel) -> None:
    assert calibrated.heads is not None
    limits = dict(zip("abc", calibrated.heads.head(0).label_thresholds, strict=True))
    texts = [row["text"] for row in DATA["topics"]]
    found = calibrated.predict(texts, task="topics")
    assert len({len(one.answer) for one in found}) > 1  # type: ignore[arg-type]
    for one in found:
        assert one.probabilities is not None
        expected = tuple(label for label in "abc" if one.probabilities[label] > limits[label])
        assert one.answer == expected
        assert one.target == tuple(map("abc".index, expected))
    shares = calibrated.predict_proba(texts, "topics")
    assert shares.shape == (len(texts), 3)
    np.testing.assert_array_equal(shares[0], np.array([*found[0].probabilities.values()], np.float32))  # type: ignore[union-attr]
    for several, one in zip(calibrated.predict(texts, tasks=["topics", "mood"]), found, strict=True):
        assert several[0].answer == one.answer
        assert isinstance(several[1].answer, str)


def test_evaluation_scores_sets_and_refuses_what_is_none(calibrated: HyperAdapterModel) -> None:
    rows = examples_of(calibrated)
    found = evaluate(calibrated, rows)
    assert set(found.tasks["topics"]) == {*TOPICS.metrics}
    assert set(found.calibration) == {"mood"}
    for target in ((3,), (1, 0), (0, 0), 1, "a", [0]):
        with pytest.raises(DataError, match="expected a tuple of indices of labels, 0 to 2 in ascending order"):
            evaluate(calibrated, [Example(0, "w1", None, target)])  # type: ignore[arg-type]


def test_answers_within_an_error_are_not_given_because_no_bound_is_known(calibrated: HyperAdapterModel) -> None:
    found = list(Predictor(calibrated, max_error=0.9)(["w1 w30"], task="topics"))
    assert found[0].answer is None
    assert found[0].probabilities is not None


def test_files_have_lists_or_cells_of_labels(calibrated: HyperAdapterModel, tmp_path: Path) -> None:
    texts = [row["text"] for row in DATA["topics"]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = [one.answer for one in calibrated.predict(texts, task="topics")]
    for ending in ("jsonl", "csv"):
        predict_file(Predictor(calibrated), tmp_path / "in.jsonl", "topics", tmp_path / f"out.{ending}")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [tuple(line["answer"]) for line in lines] == expected
    with (tmp_path / "out.csv").open(newline="") as file:
        cells = [row["answer"] for row in csv.DictReader(file)]
    assert cells == [";".join(one) for one in expected]  # type: ignore[arg-type]


def test_the_linear_probe_and_the_calibration_of_a_model_know_such_tasks(calibrated: HyperAdapterModel) -> None:
    rows = [Example(0, row.text, None, row.target) for row in examples_of(calibrated, [TOPICS])]
    found = linear_probe(calibrated, TaskData(TOPICS, {"train": rows, "validation": rows, "test": rows}))
    assert found["micro_f1"] > 0.5
    model = stirred(make())
    report = calibrate_model(model, {"topics": DATA["topics"]})
    assert report.tasks["topics"].temperature is not None
    assert report.tasks["mood"].temperature is None
    assert model.heads is not None
    assert model.heads.temperature[3] == 1


# Storage and change


def test_a_checkpoint_keeps_thresholds_and_only_those_that_differ(
    calibrated: HyperAdapterModel, tmp_path: Path
) -> None:
    calibrated.save_pretrained(tmp_path / "with")
    again = HyperAdapterModel.from_pretrained(tmp_path / "with", backbone=tiny_backbone("bert"))
    again.tokenizer = tiny_tokenizer()
    assert again.tasks == calibrated.tasks
    assert calibrated.heads is not None
    assert again.heads is not None
    assert torch.equal(again.heads.thresholds, calibrated.heads.thresholds)
    texts = [row["text"] for row in DATA["topics"]]
    assert again.predict(texts, task="topics") == calibrated.predict(texts, task="topics")
    new = make()
    new.save_pretrained(tmp_path / "without")
    assert b"thresholds" not in next((tmp_path / "without").glob("*.safetensors")).read_bytes().split(b"method.")[0]


FEW = [
    {"text": f"w{n} w{39 - n}", "label": [name for name, has in (("p", n % 2), ("q", n > 6)) if has]} for n in range(9)
]


def answers_of(model: HyperAdapterModel) -> list[Any]:
    found = model.predict([row["text"] for row in DATA["topics"]], task="topics")
    return [(one.answer, one.probabilities) for one in found]


@pytest.mark.parametrize("fit", ["head", "adapter", "prototype", "none", "shared"])
def test_a_task_is_added_and_fitted_again_with_labels_that_no_example_has(fit: Any) -> None:
    model = stirred(make())
    before = answers_of(model)
    new = Task.multi_label("new", ["p", "q", "never"])
    model.add_task(new, FEW, fit=fit, max_steps=4)
    answers = [one.answer for one in model.predict([row["text"] for row in FEW], task="new")]
    assert all(set(answer) <= {"p", "q"} for answer in answers)  # type: ignore[arg-type]
    if fit != "shared":
        assert answers_of(model) == before
    assert model.heads is not None
    head = model.heads.head(4)
    assert (head.thresholds is not None and bool((head.thresholds != 0.5).any())) == (fit == "head")
    model.refit_task("new", [{**row, "label": [*row["label"], "never"]} for row in FEW], fit=fit, max_steps=4)
    assert all("never" in one.answer for one in model.predict([row["text"] for row in FEW], task="new"))  # type: ignore[operator]


def test_labels_of_a_new_task_are_those_of_its_examples() -> None:
    model = stirred(make())
    model.add_task(Task(name="new", kind="multi-label"), FEW, k_per_label=2)
    assert model.tasks[-1].labels == ("p", "q")
    with pytest.raises(TaskError, match="task 'none': its labels are unknown"):
        model.add_task(Task(name="none", kind="multi-label"), [{"text": "w1", "label": []}])
    model.add_task(Task.multi_label("single", ["p"]), [{"text": "w1", "label": "p"}])
    assert model.predict(["w1"], task="single")[0].answer == ("p",)


def test_a_new_task_learns_from_one_with_the_same_labels_only_if_it_is_of_the_same_kind() -> None:
    model = stirred(make())
    rows = [{"text": "w1 w30", "label": ["a"]}, {"text": "w2 w31", "label": ["b", "c"]}]
    model.add_task(Task.multi_label("twin", ["c", "b", "a"]), rows)
    model.add_task(
        Task.classification("other", ["a", "b", "c"]), [{"text": f"w{n}", "label": "abc"[n]} for n in range(3)]
    )
    assert model.heads is not None
    alone = stirred(make_plus_model(TASKS[1:]))
    alone.add_task(Task.multi_label("twin", ["c", "b", "a"]), rows)
    assert alone.heads is not None
    assert not torch.equal(model.heads.head(4).weight, alone.heads.head(3).weight)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_backbones_that_generate_text_refuse_such_tasks(kind: str) -> None:
    with pytest.raises(TaskError, match="'topics' is multi-label, which needs an encoder such as BERT"):
        HyperAdapterModel(tiny_backbone(kind), [TOPICS])


def test_other_methods_have_such_tasks_too() -> None:
    model = make_method_model("bert", "task_adapter")
    again = HyperAdapterModel(model.detach(), TASKS, model.adapter_config)
    again.tokenizer = tiny_tokenizer()
    assert isinstance(again.eval().predict(["w1"], task="topics")[0].answer, tuple)


# Export


def test_exported_files_have_the_kind_and_the_thresholds(calibrated: HyperAdapterModel, tmp_path: Path) -> None:
    write_task_files(calibrated, "topics", tmp_path)
    described = json.loads((tmp_path / "hyperadapters_task.json").read_text())
    assert described["task"]["kind"] == "multi-label"
    assert calibrated.heads is not None
    assert described["head"]["thresholds"] == calibrated.heads.head(0).label_thresholds
    config = classifier_config(calibrated, 0)
    assert (config.problem_type, config.id2label) == ("multi_label_classification", {0: "a", 1: "b", 2: "c"})
    write_task_files(calibrated, "mood", tmp_path)
    assert "thresholds" not in json.loads((tmp_path / "hyperadapters_task.json").read_text())["head"]
