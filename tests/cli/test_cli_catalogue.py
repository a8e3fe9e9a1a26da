"""The commands `tasks` and `sweep`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from command_line import ROWS, Cli, assert_refused, write_recipe, write_rows
from rich.console import Console

from hyperadapters.cli.tables import print_catalogue
from hyperadapters.config.catalogue import catalogue, find_entry


def test_tasks_are_lines_of_cells_where_the_output_is_no_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("tasks")
    assert (result.code, result.err) == (0, "")
    rows = [line.split("\t") for line in result.out.splitlines()]
    assert [row[0] for row in rows] == list(catalogue())
    assert rows[0][2:] == ["classification", "accuracy", "allenai/winogrande winogrande_l"]
    assert {len(row) for row in rows} == {5}
    monkeypatch.setenv("COLUMNS", "20")
    assert cli("tasks").out == result.out


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tasks_are_a_table_in_a_terminal_with_whole_names(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, _environ={})
    print_catalogue([find_entry(name) for name in catalogue()], console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    first = {line.split("│")[1].strip() for line in lines if "│" in line}
    assert first >= catalogue().keys()
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
    assert ("allenai/winogrande" in "".join(lines)) == (width == 200)


def test_task_is_shown_with_its_verbalizer_splits_and_source(cli: Cli) -> None:
    shown = yaml.safe_load(cli("tasks", "--show", "texts/trec").out)
    assert shown["verbalizer"]["HUM"] == "human"
    assert shown["splits"] == {
        "train": "split train of the data set",
        "validation": "10 % of the rows of train",
        "test": "split test of the data set",
    }
    assert shown["source"]["dataset"] == "tasksource/trec"
    assert shown == json.loads(cli("tasks", "--show", "texts/trec", "--json").out)
    assert json.loads(cli("tasks", "--json").out).keys() == catalogue().keys()


def test_shown_task_has_what_recipes_leave_to_the_defaults(cli: Cli) -> None:
    shown = yaml.safe_load(cli("tasks", "--show", "texts/banking77").out)
    assert shown["kind"] == "classification"
    assert shown["labels"] == "the labels of the training rows, sorted"
    assert shown["source"]["held_out"] == {"validation": {"from": "train", "size": 1000}}
    assert "labels" not in yaml.safe_load(cli("tasks", "--show", "glue/stsb").out)


def test_unknown_task_is_refused(cli: Cli) -> None:
    assert_refused(cli("tasks", "--show", "glue/mnly"), "Did you mean 'glue/mnli'?")


@pytest.fixture
def recipe(tmp_path: Path, bert_folder: Path) -> Path:
    """A recipe of a sweep with two trials, of which the second one fails."""
    write_rows(tmp_path / "data", **ROWS)
    return write_recipe(
        tmp_path / "recipe.yaml",
        backbone=str(bert_folder),
        model={"preset": "paper", "adapter_dim": 2},
        data={"max_length": 32},
        training={"max_steps": 1},
        tasks=[{"name": "mood", "source": {"path": "data/{split}.jsonl"}}],
        sweep={"cases": [{}, {"training.attention": "flash_attention_2"}], "grid": {"seed": [7]}},
    )


def test_sweep_prints_the_scores_of_its_trials(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert ", 2 trials\nvalid" in cli("validate", recipe).out
    result = cli("sweep", recipe, "--output", tmp_path / "out")
    assert result.code == 0
    first, second = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert f"{first['validation']:.1f}" in result.out
    assert "RecipeError: training.attention: 'flash_attention_2' cannot be used" in second["error"]
    table, _, rest = result.out.partition("1 of 2 trials failed:\n")
    assert [cell.strip() for cell in table.splitlines()[-2].split("│")[1:-1]][2:] == ["failed", ""]
    assert len(rest.splitlines()) == 2
    assert "  trial 1: RecipeError: training.attention: 'flash_attention_2' cannot be used" in rest
    assert_refused(cli("sweep", recipe, "--output", tmp_path / "out"), "already contains a sweep")


def test_quiet_sweep_only_logs_warnings(
    cli: Cli, recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cli("sweep", recipe, "--output", tmp_path / "out", "--quiet") == (0, "", "")
    [warning] = caplog.messages
    assert warning.startswith("trial 1 failed with RecipeError: training.attention")
    assert cli("sweep", recipe, "--output", tmp_path / "out", "--resume", "--quiet") == (0, "", "")


def test_json_log_of_a_sweep_names_its_trials_and_ends_with_their_rows(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    events = [
        json.loads(line) for line in cli("sweep", recipe, "--output", tmp_path / "out", "--json-log").out.splitlines()
    ]
    assert [event["event"] for event in events] == ["trial", "begin", "evaluation", "end", "trial", "result"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    started = [event for event in events if event["event"] == "trial"]
    assert started == [{"event": "trial", "trial": row["trial"], "settings": row["settings"]} for row in rows]
    assert events[-1] == {"event": "result", "trials": rows}
