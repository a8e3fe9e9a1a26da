"""The tasks of a saved run from the command line: what is refused changes no file, and what is written is whole."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damaged_runs
import pytest
import torch
from command_line import ROWS, Cli, assert_refused, write_recipe, write_rows
from helpers import empty_centroids, save_backbone
from other_processes import start_command

from hyperadapters import HyperAdapterModel, Task

COLOURS = [("red w1", "red"), ("blue w2", "blue"), ("red w3", "red"), ("blue w4", "blue")]
TASKS = {
    "mood": Task.classification("mood", ["no", "yes"]),
    "colour": Task.classification("colour", ["blue", "red"]),
}


def _make_run(folder: Path, backbone: Path, tasks: list[Task]) -> Path:
    """A folder as a finished run leaves it."""
    write_rows(folder / "data", **ROWS)
    for split in ROWS:
        write_rows(folder / "data", **{f"colour-{split}": COLOURS})
    model = HyperAdapterModel.from_backbone(str(backbone), tasks, adapter_dim=2, prototype_dim=4, hidden_dim=4)
    with torch.no_grad():
        empty_centroids(model).normal_()
        for parameter in model.method.hypernetwork.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder / "run")
    entries = [
        {"name": "mood", "labels": ["no", "yes"], "source": {"path": "../data/{split}.jsonl"}},
        {"name": "colour", "labels": ["blue", "red"], "source": {"path": "../data/colour-{split}.jsonl"}},
    ]
    recipe: dict[str, Any] = {"data": {"max_length": 32}, "training": {"max_steps": 1}, "tasks": entries}
    write_recipe(folder / "run" / "resolved_recipe.yaml", backbone=str(backbone), **recipe)
    return folder / "run"


@pytest.fixture
def run(tmp_path: Path, bert_folder: Path) -> Path:
    return _make_run(tmp_path, bert_folder, list(TASKS.values()))


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    return write_examples(tmp_path / "examples.jsonl", [("good w1", "in"), ("bad w2", "out"), ("good w3", "in")])


def write_examples(path: Path, rows: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def names_in(run: Path) -> list[str]:
    return [task.name for task in HyperAdapterModel.from_pretrained(run).tasks]


# What works


@pytest.mark.parametrize("fit", ["prototype", "adapter", "shared", "none"])
def test_an_added_task_is_reported_saved_and_answers(
    cli: Cli, tmp_path: Path, run: Path, examples: Path, fit: str
) -> None:
    model = HyperAdapterModel.from_pretrained(run)
    expected = model.add_task(Task(name="place"), [json.loads(line) for line in examples.read_text().splitlines()])
    result = cli("add-task", run, "--name", "place", "--examples", examples, "--fit", fit)
    assert result.code == 0
    assert ("the other tasks of this run will change" in result.err) == (fit == "shared")
    assert "'place': 3 examples, initialised with nearest" in result.out
    similar = ", ".join(f"{known.task} ({known.similarity:.3f})" for known in expected.neighbours)
    assert f"most similar tasks by prototypes: {similar}\n" in result.out
    assert re.search(
        rf"fit {fit}: \d+\.\d s" if fit == "none" else rf"fit {fit}: \d+ steps? \(leave-one-out\)", result.out
    )
    assert ("changed 'mood': adapter by " in result.out) == (fit == "shared")
    assert names_in(run) == ["mood", "colour", "place"]
    texts = write_examples(tmp_path / "texts.jsonl", [("good w1", ""), ("bad w9", "")])
    result = cli("predict", run, "--input", texts, "--task", "place")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0
    assert [record["task"] for record in records] == ["place", "place"]
    assert all(record["probabilities"].keys() == {"in", "out"} for record in records)


def test_the_columns_of_the_text_and_the_label_can_be_named(cli: Cli, tmp_path: Path, run: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("message,class\n" + "".join(f"w{n} {'red' if n % 2 else 'blue'},l{n % 2}\n" for n in range(8)))
    commands = [
        (True, "add-task", run, "--name", "shade", "--examples", rows),
        (True, "refit-task", run, "--name", "shade", "--examples", rows),
        (True, "calibrate", run, "--inputs", rows, "--task", "shade"),
        (False, "suggest", run, "--task", "shade", "--pool", rows),
        (False, "predict", run, "--task", "shade", "--input", rows),
    ]
    for reads_labels, *command in commands:
        texts, labels = ("--text", "message"), ("--label-column", "class")
        assert_refused(cli(*command, *(labels if reads_labels else ())), "line 2: no column 'text'. ", "--text COLUMN")
        if command[0] in ("add-task", "refit-task"):
            assert_refused(cli(*command, *texts), "line 2: no column 'label'. ", "--label-column COLUMN")
        without = cli(*command, *texts) if command[0] == "calibrate" else None
        result = cli(*command, *texts, *(labels if reads_labels else ()))
        assert result.code == 0, result.err
        if without is not None:  # the temperature, which needs labels, is missing
            assert len(re.findall(r"\d\.\d{3}", without.out)) == len(re.findall(r"\d\.\d{3}", result.out)) - 1
    assert [json.loads(line)["text"] for line in result.out.splitlines()][:2] == ["w0 blue", "w1 red"]


@pytest.mark.parametrize("labels", [["red", "blue"], ["red=red red", "blue=the text is blue"]])
def test_a_task_is_added_from_its_labels_alone(cli: Cli, run: Path, labels: list[str]) -> None:
    result = cli("add-task", run, "--name", "shade", *(part for label in labels for part in ("--label", label)))
    assert result.code == 0
    assert "'shade': 0 examples" in result.out
    assert re.search(
        r"description of each label counts like (1 more example|\S+ more examples) of it$", result.out, re.MULTILINE
    )
    assert re.search(r"^  fit head: \d+\.\d s$", result.out, re.MULTILINE)
    added = HyperAdapterModel.from_pretrained(run).tasks[-1]
    assert added.labels == ("red", "blue")
    assert added.descriptions == (dict(label.split("=") for label in labels) if "=" in labels[0] else None)


def test_labels_with_descriptions_are_given_beside_examples(cli: Cli, run: Path, examples: Path) -> None:
    labels = ("--label", "out=bad", "--label", "other=something else", "--label", "in=good")
    assert cli("add-task", run, "--name", "place", "--examples", examples, *labels).code == 0
    assert HyperAdapterModel.from_pretrained(run).tasks[-1].labels == ("out", "other", "in")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --examples, or labels with --label; found neither"),
        (["--label", "a=b", "--label", "c"], "expected a description of each label or of none, found none of 'c'"),
        (["--label", "a=b", "--label", "a=c"], "labels must be different from each other"),
        (["--label", "a=b", "--label", "c="], "descriptions must have letters"),
        (["--label", "1", "--label", "2"], "no examples; expected at least one of each label; only a new"),
        (["--label", "a", "--label", "b", "--kind", "multi-label"], "no examples; expected at least one; only a new"),
    ],
)
def test_labels_that_do_not_suffice_are_refused(cli: Cli, run: Path, options: list[object], message: str) -> None:
    refused(cli, run, ["add-task", "--name", "x", *options], message)


def test_the_other_tasks_answer_as_before(cli: Cli, tmp_path: Path, run: Path, examples: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "good w1", "task": "mood"}\n{"text": "red w2 w3", "task": "colour"}\n')

    def answers() -> list[list[Any]]:
        records = [json.loads(line) for line in cli("predict", run, "--input", texts).out.splitlines()]
        return [[record[name] for name in ("task", "answer", "probabilities")] for record in records]

    before = answers()
    assert [task for task, *_ in before] == ["mood", "colour"]
    assert cli("add-task", run, "--name", "place", "--examples", examples).code == 0
    assert answers() == before
    assert cli("refit-task", run, "--name", "place", "--examples", examples, "--fit", "prototype").code == 0
    assert answers() == before
    assert cli("remove-task", run, "--name", "place").code == 0
    assert answers() == before


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_examples_are_read_from_each_type_of_file(cli: Cli, tmp_path: Path, run: Path, ending: str) -> None:
    rows = [{"text": "w1", "text_pair": "w2", "label": "in"}, {"text": "w3", "text_pair": "w4", "label": "out"}]
    path = tmp_path / f"examples.{ending}"
    if ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    assert cli("add-task", run, "--name", "place", "--examples", path, "--fit", "none").code == 0
    task = HyperAdapterModel.from_pretrained(run).tasks[2]
    assert (task.fields, task.labels) == (("text", "text_pair"), ("in", "out"))


def test_examples_are_read_with_another_delimiter(cli: Cli, tmp_path: Path, run: Path) -> None:
    path = tmp_path / "examples.csv"
    path.write_text("text;label\nw1, w2;in\nw3;out\n")
    refused(cli, run, ["add-task", "--name", "place", "--examples", path], "seems to be delimited by ';'")
    options = ["--examples", path, "--fit", "none", "--delimiter", ";"]
    assert cli("add-task", run, "--name", "place", *options).code == 0
    assert cli("refit-task", run, "--name", "place", *options).code == 0
    assert HyperAdapterModel.from_pretrained(run).tasks[2].labels == ("in", "out")


def test_kind_metric_and_subset_are_those_asked_for(cli: Cli, tmp_path: Path, run: Path) -> None:
    rows = write_examples(tmp_path / "numbers.jsonl", [(f"w{n}", n) for n in range(6)])
    options = ["--kind", "regression", "--metric", "spearman", "--k-per-label", "4", "--fit", "none", "--seed", "1"]
    result = cli("add-task", run, "--name", "price", "--examples", rows, "--init", "random", *options)
    assert result.code == 0
    assert "'price': 4 examples, initialised with random" in result.out
    assert HyperAdapterModel.from_pretrained(run).tasks[2] == Task.regression("price", metrics=["spearman"])


def test_a_task_with_several_labels_in_a_cell_is_added_and_predicted(cli: Cli, tmp_path: Path, run: Path) -> None:
    (tmp_path / "topics.csv").write_text("text,label\ngood w1,a;b\nbad w2,\ngood w3,b\n")
    arguments = ["--name", "topics", "--kind", "multi-label", "--examples", tmp_path / "topics.csv"]
    assert cli("add-task", run, *arguments).code == 0
    task = HyperAdapterModel.from_pretrained(run).tasks[2]
    assert task == Task.multi_label("topics", ["a", "b"])
    options = ["--input", tmp_path / "topics.csv", "--task", "topics", "--output", tmp_path / "answers.jsonl"]
    assert cli("predict", run, *options).code == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert all(isinstance(answer, list) and {*answer} <= {"a", "b"} for answer in answers)


def test_a_text_task_is_added_to_a_text_to_text_backbone(cli: Cli, tmp_path: Path) -> None:
    backbone = save_backbone(tmp_path / "t5", "t5")
    run = _make_run(tmp_path, backbone, [Task.text_to_text("write")])
    rows = write_examples(tmp_path / "rows.jsonl", [("w1", "red")])
    options = ["--kind", "text-to-text", "--fit", "none"]
    assert cli("add-task", run, "--name", "say", "--examples", rows, *options).code == 0
    result = cli("predict", run, "--input", rows, "--task", "say")
    assert result.code == 0
    assert json.loads(result.out)["task"] == "say"


def test_a_refitted_task_keeps_its_place(cli: Cli, tmp_path: Path, run: Path) -> None:
    rows = write_examples(tmp_path / "rows.jsonl", ROWS["train"][:3])
    result = cli("refit-task", run, "--name", "mood", "--examples", rows)
    assert result.code == 0
    assert "'mood': 3 examples, initialised with current" in result.out
    assert "most similar tasks by prototypes: colour (" in result.out
    assert names_in(run) == ["mood", "colour"]


def test_removed_and_renamed_tasks_are_named(cli: Cli, run: Path, examples: Path) -> None:
    cli("add-task", run, "--name", "place", "--examples", examples, "--fit", "none")
    assert cli("rename-task", run, "--name", "place", "--to", "Ort ü 1") == (0, "Renamed 'place' to 'Ort ü 1'\n", "")
    assert cli("remove-task", run, "--name", "mood") == (0, "Removed 'mood'. Tasks now: colour, Ort ü 1\n", "")
    assert names_in(run) == ["colour", "Ort ü 1"]


def test_evaluate_scores_the_tasks_of_the_recipe_that_are_left(
    cli: Cli, tmp_path: Path, run: Path, examples: Path
) -> None:
    def scores() -> dict[str, Any]:
        result = cli("evaluate", run, "--output", tmp_path / "scores.json")
        assert result.code == 0
        found: dict[str, Any] = json.loads((tmp_path / "scores.json").read_text())["tasks"]
        return found

    before = scores()
    assert cli("add-task", run, "--name", "place", "--examples", examples, "--fit", "none").code == 0
    assert scores() == before
    cli("remove-task", run, "--name", "mood")
    assert scores() == {"colour": before["colour"]}
    cli("rename-task", run, "--name", "colour", "--to", "shade")
    assert_refused(cli("evaluate", run), "none of the tasks that its recipe describes")


def test_tasks_that_swap_their_names_are_not_scored_on_the_data_of_each_other(
    cli: Cli, run: Path, bert_folder: Path, examples: Path
) -> None:
    labels = ["no", "yes"]
    entries = [{"name": name, "labels": labels, "source": {"path": "../data/{split}.jsonl"}} for name in TASKS]
    write_recipe(run / "resolved_recipe.yaml", backbone=str(bert_folder), training={"max_steps": 1}, tasks=entries)
    tasks = [Task.classification(name, labels) for name in TASKS]
    HyperAdapterModel.from_backbone(str(bert_folder), tasks, adapter_dim=2).save_pretrained(run)
    assert cli("evaluate", run).code == 0

    cli("add-task", run, "--name", "place", "--examples", examples, "--fit", "none")
    for name, new_name in (("mood", "x"), ("colour", "mood")):
        assert cli("rename-task", run, "--name", name, "--to", new_name).code == 0
    assert_refused(cli("evaluate", run), "none of the tasks that its recipe describes")
    assert cli("rename-task", run, "--name", "x", "--to", "colour").code == 0
    assert_refused(cli("evaluate", run), "none of the tasks that its recipe describes")

    model = HyperAdapterModel.from_pretrained(run)
    assert model.task_table.renamed == {"mood": "colour", "colour": "mood"}
    for name, new_name in (("mood", "x"), ("colour", "mood"), ("place", "here")):
        model.rename_task(name, new_name)
    model.save_pretrained(run)
    result = cli("evaluate", run)
    assert result.code == 0
    assert "mood" in result.out
    assert [line.split("'")[1] for line in result.err.splitlines()] == ["colour", "here", "x"]
    model.remove_task("x")
    assert model.task_table.renamed == {"here": "place"}


@pytest.mark.parametrize("command", ["add-task", "refit-task", "remove-task", "rename-task"])
def test_help_of_each_command_has_an_example(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert f"hyperadapters {command} " in result.out.partition("Example")[2]


# What is refused


def refused(cli: Cli, run: Path, arguments: list[object], *messages: str) -> None:
    before = checksums(run)
    assert_refused(cli(arguments[0], run, *arguments[1:]), *messages)
    assert checksums(run) == before


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--name", "mood"], ["task 'mood' exists; choose another name, or fit it again"]),
        (["--name", "a/b"], ["name: must not contain path separators or control characters"]),
        (["--name", ".."], ["name: must not contain path separators"]),
        (["--name", "a\nb"], ["name: must not contain path separators or control characters"]),
        (["--name", ""], ["name: expected 1 to 100 characters"]),
        (["--name", "x", "--fit", "adaptr"], ["Unknown fit 'adaptr'. Did you mean 'adapter'?"]),
        (["--name", "x", "--init", "neares"], ["Unknown init 'neares'. Did you mean 'nearest'?"]),
        (["--name", "x", "--init", "current"], ["Unknown init 'current'"]),
        (["--name", "x", "--kind", "regresion"], ["kind: ", "Did you mean 'regression'?"]),
        (["--name", "x", "--kind", "regression"], ["line 1: expected a number as target, found 'in'"]),
        (["--name", "x", "--kind", "text-to-text"], ["'x' is text-to-text, which needs an encoder-decoder"]),
        (["--name", "x", "--metric", "acuracy"], ["Did you mean 'accuracy'?"]),
    ],
)
def test_a_task_that_cannot_be_is_refused(
    cli: Cli, run: Path, examples: Path, options: list[object], messages: list[str]
) -> None:
    refused(cli, run, ["add-task", "--examples", examples, *options], *messages)


@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        ("", ["task 'x': no examples; expected at least one"]),
        ("\n \n", ["task 'x': no examples; expected at least one"]),
        ('{"text": "a", "label": "in"}\n{"text": "b", "label": "in"}\n', ["at least two labels, found only 'in'"]),
        (
            '{"txt": "a", "label": "in"}\n{"txt": "b", "label": "out"}\n',
            ["examples.jsonl, line 1: no column 'text'. Did you mean 'txt'?"],
        ),
        ('{"text": "a", "lable": "in"}\n', ["examples.jsonl, line 1: no column 'label'. Did you mean 'lable'?"]),
        (
            '{"text": "a", "label": "in"}\n{"text": 3, "label": "out"}\n',
            ["examples.jsonl, line 2: expected a string in 'text', found 3"],
        ),
        (
            '{"text": "a", "label": "in"}\n{"text": "b", "label": null}\n',
            ["examples.jsonl, line 2: expected a label, found None"],
        ),
        ('{"text": "a", "label": "in"}\nb\n', ["examples.jsonl, line 2: expected a JSON object on each line"]),
        (
            '{"text": "a", "label": "in"}\n{"text": "b", "label": "\\ud83d"}\n',
            ["examples.jsonl, line 2: ", "not valid Unicode"],
        ),
    ],
)
def test_wrong_examples_are_refused(cli: Cli, run: Path, examples: Path, rows: str, messages: list[str]) -> None:
    examples.write_text(rows)
    refused(cli, run, ["add-task", "--name", "x", "--examples", examples], *messages)


@pytest.mark.parametrize("command", ["add-task", "refit-task"])
def test_a_missing_file_or_one_of_another_type_is_refused(cli: Cli, run: Path, examples: Path, command: str) -> None:
    name = "x" if command == "add-task" else "mood"
    other = examples.rename(examples.with_suffix(".xlsx"))
    refused(cli, run, [command, "--name", name, "--examples", other], "unknown type '.xlsx'; expected one of .jsonl")
    refused(cli, run, [command, "--name", name, "--examples", examples], "examples.jsonl: no such file")
    refused(cli, run, [command, "--name", name, "--examples", examples.parent], "expected a file, found a folder")


@pytest.mark.parametrize(
    ("rows", "options", "messages"),
    [
        (ROWS["train"], ["--name", "moood"], ["Unknown task 'moood'. Did you mean 'mood'? Known: colour, mood."]),
        ([("w1", "yess")], ["--name", "mood"], ["line 1: unknown label 'yess' of task 'mood'. Did you mean 'yes'?"]),
        ([("w1", "yes")], ["--name", "mood"], ["no example of label(s) no; expected at least one of each label"]),
        (ROWS["train"], ["--name", "mood", "--fit", "all"], ["Unknown fit 'all'"]),
        (ROWS["train"], ["--name", "mood", "--init", "curent"], ["Unknown init 'curent'. Did you mean 'current'?"]),
    ],
)
def test_a_wrong_refit_is_refused(
    cli: Cli, run: Path, examples: Path, rows: list[tuple[str, str]], options: list[object], messages: list[str]
) -> None:
    write_examples(examples, rows)
    refused(cli, run, ["refit-task", "--examples", examples, *options], *messages)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["remove-task", "--name", "moood"], ["Unknown task 'moood'. Did you mean 'mood'? Known: colour, mood."]),
        (["rename-task", "--name", "moood", "--to", "x"], ["Unknown task 'moood'. Did you mean 'mood'?"]),
        (["rename-task", "--name", "mood", "--to", "colour"], ["found 'colour' 2 times"]),
        (["rename-task", "--name", "mood", "--to", "a/b"], ["name: must not contain path separators"]),
        (["rename-task", "--name", "mood", "--to", "a\x1bb"], ["name: must not contain path separators or control"]),
        (["rename-task", "--name", "mood", "--to", ""], ["name: expected 1 to 100 characters"]),
    ],
)
def test_a_wrong_removal_or_name_is_refused(cli: Cli, run: Path, arguments: list[object], messages: list[str]) -> None:
    refused(cli, run, arguments, *messages)


def test_the_last_task_is_not_removed(cli: Cli, run: Path) -> None:
    assert cli("remove-task", run, "--name", "colour").code == 0
    refused(cli, run, ["remove-task", "--name", "mood"], "'mood' is the only task", "add another before removing it")


@pytest.mark.parametrize("k", ["0", "-1", "many"])
def test_a_wrong_number_of_examples_is_refused(cli: Cli, run: Path, examples: Path, k: str) -> None:
    before = checksums(run)
    result = cli("add-task", run, "--name", "x", "--examples", examples, "--k-per-label", k)
    assert result.code == 2
    assert "--k-per-label" in result.err
    assert checksums(run) == before


def _arguments(command: str, examples: Path) -> list[object]:
    return {
        "add-task": ["add-task", "--name", "x", "--examples", examples],
        "refit-task": ["refit-task", "--name", "mood", "--examples", examples],
        "remove-task": ["remove-task", "--name", "mood"],
        "rename-task": ["rename-task", "--name", "mood", "--to", "x"],
    }[command]


@pytest.mark.parametrize("command", ["add-task", "refit-task", "remove-task", "rename-task"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_runs.weights_gone, "the weights cannot be read"),
        (damaged_runs.weights_truncated, "truncated or altered"),
        (damaged_runs.json_truncated, "the checkpoint is damaged"),
        (damaged_runs.json_altered, "was altered after it was written"),
        (damaged_runs.json_newer, "has format 99"),
        (damaged_runs.backbone_replaced, "was trained on backbone"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(
    cli: Cli, run: Path, examples: Path, command: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(run)
    refused(cli, run, _arguments(command, examples), message)


# What cannot be written


@pytest.mark.parametrize("step", range(1, 7))
@pytest.mark.parametrize("command", ["add-task", "remove-task"])
def test_a_full_disk_leaves_the_old_or_the_new_tasks(
    cli: Cli, run: Path, examples: Path, command: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps: fsync, replace and fsync of the folder for the weights, then the same for the JSON file."""
    calls = 0
    old = (run / "hyperadapter.json").read_bytes()
    arguments = _arguments(command, examples)

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= step:
                raise OSError("no space left")
            return real(*values)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "replace", failing(os.replace))
        fit = ["--fit", "none"] if command == "add-task" else []
        assert_refused(cli(arguments[0], run, *arguments[1:], *fit), "cannot be written: no space left")
    assert ((run / "hyperadapter.json").read_bytes() == old) == (step < 6)
    new = ["mood", "colour", "x"] if command == "add-task" else ["colour"]
    assert names_in(run) == (["mood", "colour"] if step < 6 else new)


def test_commands_that_change_a_run_at_the_same_time_wait_for_each_other(run: Path, examples: Path) -> None:
    names = ["first", "second", "third"]
    processes = [start_command("add-task", run, "--examples", examples, "--name", name) for name in names]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {task.name for task in HyperAdapterModel.from_pretrained(run).tasks} == {*TASKS, *names}
