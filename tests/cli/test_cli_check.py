"""`check` from the command line: exit codes, outputs, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from command_line import ROWS, Cli, assert_refused, write_recipe, write_rows

GOOD = [(f"w{number} w{number + 1} w{number + 3} good", "yes") for number in range(10)]
BAD = [(f"w{number} w{number + 7} w{number + 9} bad", "no") for number in range(10)]


@pytest.fixture
def recipe(tmp_path: Path, bert_folder: Path) -> Path:
    """A recipe whose test rows are among its training rows."""
    write_rows(tmp_path / "data", **{**ROWS, "train": GOOD + BAD, "test": GOOD[:3]})
    task = {"name": "mood", "source": {"path": "../data/{split}.jsonl"}}
    values = {"backbone": str(bert_folder), "data": {"max_length": 32}, "training": {"max_steps": 1}, "tasks": [task]}
    return write_recipe(tmp_path / "recipes" / "mood.yaml", **values)


def test_an_error_has_an_exit_code_of_its_own(cli: Cli, recipe: Path) -> None:
    result = cli("check", recipe)
    assert result.code == 3
    assert "error leakage in mood: 3 of 3 test rows are train rows too" in result.out
    assert result.out.splitlines()[-1].startswith("Not ready: 1 error")
    assert result.err == ""


@pytest.mark.parametrize(("fail_on", "test", "code"), [("never", GOOD, 0), ("error", BAD[:0], 0), ("warning", [], 3)])
def test_the_severity_that_fails_is_chosen(
    cli: Cli, recipe: Path, tmp_path: Path, fail_on: str, test: list[tuple[str, str]], code: int
) -> None:
    write_rows(tmp_path / "data", test=[*test, ("?!", "yes")])
    assert cli("check", recipe, "--fail-on", fail_on).code == code


def test_reports_are_written_and_printed_as_json(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    page, values = tmp_path / "report.html", tmp_path / "report.json"
    result = cli("check", recipe, "--json", "--output", page, "--output", values)
    assert result.code == 3
    assert json.loads(result.out) == json.loads(values.read_text())
    assert json.loads(result.out)["worst"] == "error"
    assert "<h1>Quality of the data</h1>" in page.read_text()


def test_settings_of_the_recipe_can_be_changed(cli: Cli, recipe: Path) -> None:
    result = cli("check", recipe, "--set", "data.max_length=4", "--json")
    truncated = [found for found in json.loads(result.out)["findings"] if found["check"] == "truncated"]
    assert truncated[0]["count"] == 23


def test_data_files_are_checked_without_a_recipe(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mood").mkdir()
    for split, rows in (("train", GOOD + BAD), ("dev", GOOD[:2])):
        with (tmp_path / "mood" / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("utterance", "intent"), *rows])
    result = cli("check", tmp_path / "mood", "--json", "--max-label-rows", 0)
    report = json.loads(result.out)
    assert report["tasks"][0]["rows"] == {"train": 20, "validation": 2}
    assert [found["count"] for found in report["findings"] if found["check"] == "leakage"] == [2]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--fail-on", "warnings"], ["--fail-on: Unknown severity 'warnings'. Did you mean 'warning'?"]),
        (["--output", "report.pdf"], ["report.pdf: expected a name ending in .html or .json"]),
        (["--set", "data.max_lenght=3"], ["unknown key. Did you mean 'max_length'?"]),
        (["--label", "label"], ["--text, --label, --kind and --delimiter are for data files"]),
    ],
)
def test_a_wrong_call_is_refused_and_nothing_is_written(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], messages: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(cli("check", recipe, *arguments), *messages)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_read_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,body,label\n" + "some words here,more words there,yes\n" * 3)
    (tmp_path / "two.csv").write_text("a,b,label\nsome words here,more words there,yes\nit is odd,it is even,no\n")
    (tmp_path / "commas.csv").write_text("text,label\n" + "well, this is a text,yes\n" * 3)
    assert_refused(
        cli("check", tmp_path / "commas.csv"), "found none; rows that were skipped: 3, the first: ", "line 2"
    )
    assert_refused(cli("check", tmp_path / "gone.csv"), "gone.csv: no such file")
    assert_refused(cli("check", tmp_path / "data.csv", "--label", "lable"), "Did you mean 'label'?")
    assert_refused(cli("check", tmp_path / "two.csv"), "two.csv: several columns could be the text: a, b")
    assert_refused(cli("check", tmp_path / "data.json"), "no such file. Did you mean", "data.csv")
