"""The demo: its data, its figure, and the whole of it in a few steps on the real backbone."""

from __future__ import annotations

import io
import json
import re
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from hyperadapters import HyperAdapterModel
from hyperadapters.config import Recipe, load_recipe
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import load_tasks
from hyperadapters.demo import run as demo
from hyperadapters.inference.routing import calibrate
from hyperadapters.training.run import examples_of


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(demo.recipe_path())


@pytest.fixture(scope="module")
def tasks(recipe: Recipe) -> list[TaskData]:
    return load_tasks(recipe.tasks, recipe.data, recipe.seed)


def test_there_are_six_tasks_with_enough_rows_of_every_label(tasks: list[TaskData]) -> None:
    assert len(tasks) == 6
    assert {len(data.task.labels) for data in tasks} == {2, 6, 8}
    assert sum(data.task.is_pair for data in tasks) == 1
    for data in tasks:
        sizes = {split: len(rows) for split, rows in data.splits.items()}
        assert sizes["train"] >= 60
        assert sizes["validation"] >= 20
        assert sizes["test"] >= 60
        for rows in data.splits.values():
            assert {row.target for row in rows} == set(range(len(data.task.labels)))


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def test_no_text_is_nearly_repeated_in_another_split(tasks: list[TaskData]) -> None:
    """No two texts of different splits share half of their words."""
    for data in tasks:
        words = {
            split: [_words(text) for row in rows for text in (row.text, row.text_pair) if text is not None]
            for split, rows in data.splits.items()
        }
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            for one, other in product(words[first], words[second]):
                assert len(one & other) / len(one | other) < 0.5, (data.task.name, one, other)


def test_no_text_occurs_twice(tasks: list[TaskData]) -> None:
    texts = [(row.text, row.text_pair) for data in tasks for rows in data.splits.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_the_demo_runs_on_the_real_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    short = tmp_path / "short.yaml"
    short.write_text(
        f"extends: {demo.recipe_path()}\ntraining: {{max_steps: 3, eval_steps: 3, warmup_steps: 0}}\n"
        "data: {n_train: 16, n_validation: 8}\n"
    )
    monkeypatch.setattr(demo, "recipe_path", lambda: short)
    printed = io.StringIO()
    demo.run_demo(tmp_path / "run", overwrite=False, console=Console(file=printed, width=100))
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert comparison["test"].keys() == {"majority", "linear_probe", "pha"}
    assert comparison["mean"]["linear_probe"] > comparison["mean"]["majority"]
    assert (tmp_path / "run" / "task_map.png").read_bytes().startswith(b"\x89PNG")
    for text in ("linear probe", "support_intent", "Routing:", "New inputs without a task"):
        assert text in printed.getvalue()


@pytest.fixture(scope="module")
def routed(recipe: Recipe, tasks: list[TaskData]) -> HyperAdapterModel:
    """A model whose routing is calibrated on the demo's rows. It is not trained, on which densities do not depend."""
    settings = recipe.model.model_dump(exclude_unset=True)
    model = HyperAdapterModel.from_backbone(recipe.backbone, [data.task for data in tasks], max_length=96, **settings)
    calibrate(model, examples_of(tasks, "train"), examples_of(tasks, "validation"), seed=10)
    return model


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("Where is my parcel?", "support_intent"),
        ("Two hours of fog.", "film_sentiment"),
        ("A dull and boring story", "film_sentiment"),
        ("who painted the night watch", "question_type"),
        (("How do I get candle wax out of a carpet?", "What removes wax from my rug?"), "same_question"),
        ("", None),
        (" \n", None),
        ("[CLS] [SEP]", None),
    ],
)
def test_short_texts_find_their_task_and_empty_ones_none(
    routed: HyperAdapterModel, text: str | tuple[str, str], task: str | None
) -> None:
    assert routed.route([text])[0].task == task


def test_the_first_words_of_validation_rows_find_their_task(routed: HyperAdapterModel, tasks: list[TaskData]) -> None:
    """With prototypes, 42 per cent of the first three words did, and 71 per cent of the first eight."""
    rows, names = examples_of(tasks, "validation"), [data.task.name for data in tasks]
    for count, share in ((3, 0.75), (8, 0.88)):
        short = [
            Example(
                row.task_id,
                " ".join(row.text.split()[:count]),
                row.text_pair and " ".join(row.text_pair.split()[:count]),
            )
            for row in rows
        ]
        found = [
            result.candidates[0].task == names[row.task_id or 0]
            for row, result in zip(rows, routed.route(short), strict=True)
        ]
        assert sum(found) / len(found) > share
