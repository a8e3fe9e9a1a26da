"""The catalogue of tasks: every entry is a valid task, and recipes refer to entries and replace parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hyperadapters.config import SPLITS, Recipe, TaskEntry, load_recipe, parse
from hyperadapters.config.catalogue import catalogue, expand
from hyperadapters.errors import RecipeError

TASKS = {
    "glue": "cola sst2 mrpc qqp stsb mnli qnli rte wnli",
    "super_glue": "boolq cb copa multirc record rte wic wsc",
    "mrqa": "squad newsqa triviaqa searchqa hotpotqa naturalquestions",
    "pairs": "scitail paws snli anli sick",
    "texts": "yelp_polarity imdb trec subj banking77 clinc150 hwu64",
    "choices": "winogrande social_i_qa cosmos_qa commonsense_qa hellaswag",
    "summaries": "xsum cnn_dailymail",
}


def recipe_of(**task: Any) -> dict[str, Any]:
    return {"backbone": "some/model", "training": {"max_steps": 1}, "tasks": [task]}


@pytest.mark.parametrize("name", catalogue())
def test_entry_is_a_task_with_training_validation_and_test_rows(name: str) -> None:
    entry = parse(TaskEntry, {"catalogue": name})
    assert entry.name == name.partition("/")[2]
    assert sorted(
        [*(entry.source.splits or set(SPLITS) - entry.source.held_out.keys()), *entry.source.held_out]
    ) == sorted(SPLITS)
    assert entry.template is not None
    assert catalogue()[name].summary


@pytest.mark.parametrize("name", [name for name in catalogue() if "labels" in catalogue()[name].values])
def test_entry_says_which_class_an_index_is(name: str) -> None:
    entry = parse(TaskEntry, {"catalogue": name})
    names = entry.source.label_names or {}
    classes = entry.source.class_names or tuple(names)
    assert tuple(names.get(label, label) for label in classes) == entry.labels


def test_catalogue_has_the_tasks_of_the_literature() -> None:
    for group, names in TASKS.items():
        assert {f"{group}/{name}" for name in names.split()} == {n for n in catalogue() if n.startswith(f"{group}/")}
    assert sum(name.startswith("tweet_eval/") for name in catalogue()) == 11
    assert sum(name.startswith("fdu_mtl/") for name in catalogue()) == 16


def test_task_has_everything_from_the_catalogue_that_it_does_not_give() -> None:
    entry = parse(
        TaskEntry, {"catalogue": "glue/rte", "name": "mine", "metrics": ["macro_f1"], "source": {"subset": "x"}}
    )
    whole = parse(TaskEntry, {"catalogue": "glue/rte"})
    assert (entry.name, entry.metrics, entry.source.subset) == ("mine", ("macro_f1",), "x")
    assert (entry.template, entry.labels) == (whole.template, whole.labels)
    assert (entry.source.dataset, entry.source.columns) == (whole.source.dataset, whole.source.columns)


def test_other_origin_replaces_the_data_set_and_its_splits() -> None:
    entry = parse(TaskEntry, {"catalogue": "glue/mnli", "source": {"path": "mnli/{split}.jsonl"}})
    assert (entry.source.dataset, entry.source.subset, entry.source.splits) == (None, None, None)
    assert entry.source.columns == {"text": "premise", "text_pair": "hypothesis"}
    mirror = parse(TaskEntry, {"catalogue": "glue/mnli", "source": {"dataset": "my/mirror"}}).source
    assert (mirror.dataset, mirror.subset) == ("my/mirror", "mnli")


def test_unknown_entry_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no task 'glue/mnl' in the catalogue\. Did you mean 'glue/mnli'\?"):
        parse(Recipe, recipe_of(catalogue="glue/mnl"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(catalogue="gleu/mnli")))
    with pytest.raises(RecipeError, match="Did you mean 'glue/mnli'"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("task", [{"catalogue": 3}, {"catalogue": "glue/rte", "source": "x"}, {"catalogue": None}])
def test_malformed_task_is_reported_as_a_fault_of_the_recipe(task: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"tasks\.0"):
        parse(Recipe, recipe_of(**task))


def test_paths_of_the_catalogue_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(catalogue="fdu_mtl/books")))
    [entry] = load_recipe(tmp_path / "recipe.yaml").tasks
    assert entry.source.path == str(tmp_path / "fdu-mtl" / "books" / "{split}.jsonl")


def test_entries_are_not_changed_by_the_tasks_that_use_them() -> None:
    before = yaml.safe_dump(catalogue()["glue/rte"].values)
    values = expand({"catalogue": "glue/rte"})
    values["source"]["dataset"] = "other"
    assert yaml.safe_dump(catalogue()["glue/rte"].values) == before


def test_only_texts_that_a_recipe_gives_itself_are_refused_with_task_heads() -> None:
    assert parse(TaskEntry, {"catalogue": "texts/trec"}).settings_of_texts() == []
    entry = parse(TaskEntry, {"catalogue": "texts/trec", "template": "question: {text}"})
    assert entry.settings_of_texts() == ["template"]
