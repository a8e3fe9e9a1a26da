"""The command suggest."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, assert_refused, save_run, write_lines

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.fewshot.suggest import suggest

TASKS = [Task.classification("mood", ["no", "yes"]), Task.regression("size")]
POOL = [{"text": f"w{i} w{3 * i % 17}", "id": f"row-{i}", "note": {"place": i}} for i in range(12)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("suggest"), TASKS)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "pool.jsonl", POOL)


def test_help_says_which_scores_come_first(cli: Cli) -> None:
    text = " ".join(cli("suggest", "--help").out.replace("│", " ").split())
    assert "the lower, the better to label" in text
    assert "the higher, the better to label" in text


@pytest.mark.parametrize("strategy", ["margin", "diversity"])
def test_suggested_rows_are_printed_in_order_with_all_their_columns(
    cli: Cli, run: Path, pool: Path, strategy: Any
) -> None:
    result = cli("suggest", run, "--task", "mood", "--pool", pool, "-k", 4, "--strategy", strategy)
    assert result.code == 0, result.err
    expected = suggest(HyperAdapterModel.from_pretrained(run), "mood", POOL, 4, strategy)
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [row["id"] for row in found] == [POOL[one.index]["id"] for one in expected]
    assert [row["note"] for row in found] == [POOL[one.index]["note"] for one in expected]
    assert [row["score"] for row in found] == pytest.approx([one.score for one in expected], abs=1e-6)
    assert list(found[0]) == ["text", "id", "note", "score", "reason"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_suggested_rows_are_written_to_a_file(cli: Cli, run: Path, pool: Path, tmp_path: Path, ending: str) -> None:
    printed = cli("suggest", run, "--task", "mood", "--pool", pool, "-k", 3, "--seed", 5).out.splitlines()
    output = tmp_path / f"next.{ending}"
    result = cli("suggest", run, "--task", "mood", "--pool", pool, "-k", 3, "--seed", 5, "--output", output)
    assert (result.code, result.out) == (0, "")
    with output.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file)) if ending == "csv" else list(map(json.loads, file))
    assert [row["id"] for row in found] == [json.loads(line)["id"] for line in printed]
    assert list(found[0]) == ["text", "id", "note", "score", "reason"]


def test_a_table_of_suggestions_can_be_labelled_and_learned_from(cli: Cli, run: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "pool.csv", tmp_path / "next.csv"
    source.write_text("text;label\n" + "".join(f"w{i} w{5 * i % 17};\n" for i in range(9)))
    options = ("--task", "mood", "--delimiter", ";", "--strategy", "random")
    assert cli("suggest", run, "--pool", source, "-k", 4, *options, "--output", output).code == 0
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labelled = [{"text": row["text"], "label": ["no", "yes"][place % 2]} for place, row in enumerate(rows)]
    model = HyperAdapterModel.from_pretrained(run)
    assert model.refit_task("mood", labelled, fit="none").examples == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "moods"), "Unknown task 'moods'"),
        (("--task", "mood", "--strategy", "margins"), "Unknown strategy 'margins'"),
        (("--task", "size", "--strategy", "margin"), "task 'size' is a regression task"),
        (("--task", "mood", "--output", "next.txt"), ".jsonl"),
    ],
)
def test_what_cannot_be_suggested_writes_nothing(
    cli: Cli, run: Path, pool: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    more = () if "--output" in options else ("--output", tmp_path / "next.jsonl")
    assert_refused(cli("suggest", run, "--pool", pool, *options, *more), message)
    assert [path.name for path in tmp_path.iterdir()] == ["pool.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w1", "score": 3}, "the column 'score' is also a column of the output; rename it"),
        ({"words": "w1"}, "pool.jsonl, line 1: no column 'text'"),
        ({"text": "?"}, "expected at least one row with words"),
    ],
)
def test_a_pool_that_cannot_be_used_is_named(
    cli: Cli, run: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    output = tmp_path / "next.csv"
    pool = write_lines(tmp_path / "pool.jsonl", [row])
    assert_refused(cli("suggest", run, "--task", "mood", "--pool", pool, "--output", output), message)
    assert not output.exists()


def test_a_backbone_that_writes_is_refused(cli: Cli, tmp_path: Path, t5_folder: Path, pool: Path) -> None:
    tasks = [Task.text_to_text("mood")]
    model = HyperAdapterModel.from_backbone(str(t5_folder), tasks, prototype_dim=4, hidden_dim=4)
    model.save_pretrained(tmp_path / "run")
    result = cli("suggest", tmp_path / "run", "--task", "mood", "--pool", pool)
    assert_refused(result, "expected an encoder with task heads")
