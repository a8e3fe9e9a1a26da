"""The commands `tasks` and `sweep`."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from command_line import ROWS, Cli, assert_refused, write_recipe, write_rows

from hyperadapters.config.catalogue import catalogue


def test_tasks_lists_the_catalogue(cli: Cli) -> None:
    result = cli("tasks")
    assert (result.code, result.err) == (0, "")
    assert all(name in result.out for name in catalogue())


def test_task_is_shown_with_its_label_words_splits_and_source(cli: Cli) -> None:
    shown = yaml.safe_load(cli("tasks", "--show", "texts/trec").out)
    assert shown["label_words"]["HUM"] == "human"
    assert shown["splits"] == {
        "train": "split train of the data set",
        "validation": "10 % of the rows of train",
        "test": "split test of the data set",
    }
    assert shown["source"]["dataset"] == "tasksource/trec"
    assert shown == json.loads(cli("tasks", "--show", "texts/trec", "--json").out)
    assert json.loads(cli("tasks", "--json").out).keys() == catalogue().keys()


def test_unknown_task_is_refused(cli: Cli) -> None:
    assert_refused(cli("tasks", "--show", "glue/mnly"), "Did you mean 'glue/mnli'?")


def test_sweep_prints_the_scores_of_its_trials(cli: Cli, tmp_path: Path, bert_folder: Path) -> None:
    write_rows(tmp_path / "data", **ROWS)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        backbone=str(bert_folder),
        model={"preset": "paper", "adapter_dim": 2},
        data={"max_length": 32},
        training={"max_steps": 1},
        tasks=[{"name": "mood", "source": {"path": "data/{split}.jsonl"}}],
        sweep={"cases": [{}, {"training.attention": "flash_attention_2"}], "grid": {"seed": [7]}},
    )
    assert ", 2 trials\nvalid" in cli("validate", recipe).out
    result = cli("sweep", recipe, "--output", tmp_path / "out")
    assert result.code == 0
    first, second = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert f"{first['validation']:.1f}" in result.out
    assert "RecipeError: training.attention: 'flash_attention_2' cannot be used" in second["error"]
    assert_refused(cli("sweep", recipe, "--output", tmp_path / "out"), "already contains a sweep")
