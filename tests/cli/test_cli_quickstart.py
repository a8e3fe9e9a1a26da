"""`quickstart`: its guesses, the recipe that reproduces its scores, faults that leave nothing behind (promise 11)."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Cli, assert_refused
from helpers import save_backbone

from hyperadapters import quickstart
from hyperadapters.config import load_recipe
from hyperadapters.quickstart import plan_quickstart

STEPS = 8


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "MIN_STEPS", STEPS)
    monkeypatch.setattr(quickstart, "MAX_STEPS", STEPS)


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A tiny backbone that takes as many tokens as the default settings ask for."""
    return save_backbone(tmp_path / "bert", "bert", max_position_embeddings=128)


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def texts(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(f"w{chance.randrange(25)}" for _ in range(5)) for _ in range(count)]


def moods(count: int = 40) -> list[tuple[str, str]]:
    return [(f"{text} {('bad', 'good')[n % 2]}", ("no", "yes")[n % 2]) for n, text in enumerate(texts(count))]


def test_a_file_becomes_a_run_and_its_recipe_reproduces_the_scores(cli: Cli, tmp_path: Path, bert_folder: Path) -> None:
    data = write_csv(tmp_path / "data" / "mood.csv", ("Utterance", "Intent"), moods())
    output = tmp_path / "runs" / "mood"
    result = cli("quickstart", data, "--output", output, "--backbone", bert_folder)
    assert result.code == 0
    text = (output / "recipe.yaml").read_text()
    assert text in result.out
    for comment in (
        "# Text: 'Utterance'; 'Utterance' is a usual name of the column of the text.",
        "# Label: 'Intent'; 'Intent' is a usual name of the column of the label.",
        "# Kind: classification; 'Intent' has 2 different values that are repeated.",
        "# The data have no validation and no test rows; these are held out.",
    ):
        assert comment in text
    assert f"hyperadapters predict {output} --input new.csv --text Utterance --output answers.csv" in result.out
    assert "majority class" in result.out

    again = cli("train", output / "recipe.yaml", "--output", tmp_path / "again")
    assert again.code == 0
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (output, tmp_path / "again"))
    assert first["tasks"] == second["tasks"]
    assert first["tasks"]["mood"].keys() == {"validation", "test"}

    (tmp_path / "new.csv").write_text("Utterance\nw1 w2 good\n")
    assert '"answer"' in cli("predict", output, "--input", tmp_path / "new.csv", "--text", "Utterance").out


def test_several_files_are_a_task_each(cli: Cli, tmp_path: Path, bert_folder: Path) -> None:
    mood = write_csv(tmp_path / "mood.csv", ("text", "label"), moods())
    pairs = [
        (first, second, n % 7 + 0.5) for n, (first, second) in enumerate(zip(texts(40), texts(40, 1), strict=True))
    ]
    write_csv(tmp_path / "same" / "train.csv", ("sentence1", "sentence2", "score"), pairs)
    write_csv(tmp_path / "same" / "test.csv", ("sentence1", "sentence2", "score"), pairs[:9])
    output = tmp_path / "run"
    result = cli("quickstart", mood, tmp_path / "same", "--output", output, "--backbone", bert_folder)
    assert result.code == 0
    recipe = load_recipe(output / "recipe.yaml")
    assert [(entry.name, entry.kind, entry.is_pair) for entry in recipe.tasks] == [
        ("mood", "classification", False),
        ("same", "regression", True),
    ]
    assert list(recipe.tasks[1].source.held_out) == ["validation"]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["tasks"]["same"]["test"].keys() == {"pearson"}


def test_the_written_recipe_is_the_one_that_is_trained(tmp_path: Path, bert_folder: Path) -> None:
    data = write_csv(tmp_path / "da ta" / "it's: #1.csv", ("what\nis", "x"), moods())
    output = tmp_path / "elsewhere" / "run"
    planned = plan_quickstart([data], output, str(bert_folder), label="x")
    output.mkdir(parents=True)
    (output / "recipe.yaml").write_text(planned.text)
    found = load_recipe(output / "recipe.yaml")
    assert found.tasks[0].source.columns == {"text": "what\nis", "label": "x"}
    assert found.model_copy(update={"tasks": ()}) == planned.recipe.model_copy(update={"tasks": ()})
    assert [entry.task for entry in found.tasks] == [entry.task for entry in planned.recipe.tasks]
    [path] = found.tasks[0].source.path.values()
    assert Path(path).resolve() == data
    assert "'what\\nis'" in planned.text  # a line end in a comment would end it
    assert yaml.safe_load(planned.text)["tasks"][0]["source"]["path"]["train"] == "../../da ta/it's: #1.csv"


def test_names_with_line_separators_and_another_delimiter_stay_what_they_are(tmp_path: Path, bert_folder: Path) -> None:
    data = tmp_path / "data\u2028s" / "mood.csv"
    data.parent.mkdir()
    data.write_text("te\u2028xt;label\n" + "".join(f"{text};{label}\n" for text, label in moods()))
    output = tmp_path / "runs" / "mood"
    planned = plan_quickstart([data], output, str(bert_folder), texts=["te\u2028xt"], delimiter=";")
    output.mkdir(parents=True)
    (output / "recipe.yaml").write_text(planned.text)
    source = load_recipe(output / "recipe.yaml").tasks[0].source
    assert (source.columns, source.delimiter) == ({"text": "te\u2028xt"}, ";")
    assert isinstance(source.path, dict)
    assert Path(source.path["train"]).resolve() == data.resolve()


def test_guesses_can_be_overridden(tmp_path: Path, bert_folder: Path) -> None:
    rows = [(text, other, n % 5) for n, (text, other) in enumerate(zip(texts(40), texts(40, 1), strict=True))]
    data = write_csv(tmp_path / "stars.csv", ("text", "note", "stars"), rows)
    guessed = plan_quickstart([data], tmp_path / "run", str(bert_folder)).recipe.tasks[0]
    assert (guessed.kind, guessed.source.columns) == ("regression", {"label": "stars"})
    given = plan_quickstart([data], tmp_path / "run", str(bert_folder), ["note"], "stars", "classification")
    assert given.recipe.tasks[0].kind == "classification"
    assert "# Kind: classification; it was given." in given.text


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "a,b,label\n" + "some words here,other words there,yes\n" * 3, [], "no column looks like the text"),
        ("a.csv", "text,label\n" + "some words here,yes\nmore words here,no\n" * 5, [], "expected at least 20 rows"),
        ("a.csv", "text,label\n", [], "expected at least one row"),
        ("a.csv", "text,label\nx y z,yes,1\n" * 30, [], "a.csv, line 2: expected 2 cells"),
        ("a.csv", "text,label\n" + "w1 w2,yes\n" * 20, ["--delimiter", ";"], "the only column is 'text,label'"),
        ("a.txt", "some text", [], "unknown type '.txt'"),
        ("a.csv", "text,label\n" + "w1 w2,yes\nw3 w4,no\n" * 20, ["--label", "lable"], "Did you mean 'label'?"),
        ("a.csv", "text,label\n" + "w1 w2,yes\nw3 w4,no\n" * 20, ["--kind", "regresion"], "Did you mean 'regression'"),
        ("a.csv", "text,label\n" + "w1 w2,yes\nw3 w4,no\n" * 20, ["--backbone", "./gone"], "cannot be loaded"),
        ("a.jsonl", '{"text": "w1 w2", "label": "yes"}\n' * 20 + "no json\n", [], "line 21: expected a JSON object"),
    ],
)
def test_what_cannot_be_used_is_one_error_and_nothing_is_written(
    cli: Cli, tmp_path: Path, bert_folder: Path, name: str, content: str, options: list[str], message: str
) -> None:
    (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    backbone = [] if "--backbone" in options else ["--backbone", bert_folder]
    result = cli("quickstart", tmp_path / name, "--output", tmp_path / "run", *backbone, *options)
    assert result.code == 2
    assert result.err.count("error: ") == 1
    assert message in result.err
    assert sorted(tmp_path.rglob("*")) == before


def test_files_of_one_name_and_folders_in_use_are_refused(cli: Cli, tmp_path: Path, bert_folder: Path) -> None:
    for folder in "ab":
        write_csv(tmp_path / folder / "mood.csv", ("text", "label"), moods())
    options = ("--output", tmp_path / "run", "--backbone", bert_folder)
    both = tmp_path / "a" / "mood.csv", tmp_path / "b" / "mood.csv"
    assert_refused(cli("quickstart", *both, *options), "expected a name for each task, found two with the name 'mood'")
    assert cli("quickstart", both[0], *options).code == 0
    assert_refused(cli("quickstart", both[0], *options), "already contains a run; use --overwrite")
    assert cli("quickstart", both[1], *options, "--overwrite").code == 0
    [path] = load_recipe(tmp_path / "run" / "recipe.yaml").tasks[0].source.path.values()
    assert Path(path).resolve() == both[1]
