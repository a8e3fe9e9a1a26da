"""The command line: what a user did wrong ends with exit code 2, a message, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damaged_runs
import pytest
import yaml
from command_line import ROWS, Cli, Result, assert_refused, write_recipe, write_rows
from transformers import OPTConfig

from hyperadapters import HyperAdapterModel, Task, __version__
from hyperadapters.runtime import Runtime

COMMANDS = ("train", "evaluate", "report", "predict", "export", "validate", "plan", "check", "quickstart", "demo")
# `hyperadapters.config` stands for pydantic, which typer itself loads where it is installed
HEAVY = ("torch", "transformers", "datasets", "hyperadapters.config", "yaml", "sklearn", "scipy", "numpy")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def values_of(backbone: Path, **changes: Any) -> dict[str, Any]:
    task = {"name": "mood", "labels": ["no", "yes"], "source": {"path": "../data/{split}.jsonl"}}
    values = {"backbone": str(backbone), "data": {"max_length": 32}, "training": {"max_steps": 1}, "tasks": [task]}
    return {**values, **changes}


@pytest.fixture
def recipe(tmp_path: Path, bert_folder: Path) -> Path:
    """A recipe that could be trained."""
    write_rows(tmp_path / "data", **ROWS)
    return write_recipe(tmp_path / "recipes" / "mood.yaml", **values_of(bert_folder))


@pytest.fixture
def run(tmp_path: Path, bert_folder: Path) -> Path:
    """A folder as a finished run leaves it."""
    write_rows(tmp_path / "data", **ROWS)
    model = HyperAdapterModel.from_backbone(
        str(bert_folder), [Task.classification("mood", ["no", "yes"])], adapter_dim=2, prototype_dim=4, hidden_dim=4
    )
    model.save_pretrained(tmp_path / "run")
    write_recipe(tmp_path / "run" / "resolved_recipe.yaml", **values_of(bert_folder))
    return tmp_path / "run"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good w1"}\n{"text": "bad w2"}\n')
    return path


# Export


@pytest.fixture
def lora_run(tmp_path: Path, bert_folder: Path) -> Path:
    tasks = [Task.classification("mood", ["no", "yes"]), Task.classification("tone", ["formal", "casual"])]
    model = HyperAdapterModel.from_backbone(str(bert_folder), tasks, preset="paper", form="lora", lora_rank=2)
    model.save_pretrained(tmp_path / "lora-run")
    return tmp_path / "lora-run"


def test_export_writes_a_task(cli: Cli, run: Path, lora_run: Path, tmp_path: Path) -> None:
    for folder, target, expected in (
        (lora_run, "peft-lora", "adapter_model.safetensors"),
        (lora_run, "merged", "model.safetensors"),
        (run, "adapterhub", "adapter.safetensors"),
        (run, "onnx", "model.onnx"),
    ):
        result = cli("export", folder, "--task", "mood", "--format", target, "--output", tmp_path / target)
        assert (result.code, result.out) == (0, f"Written to {tmp_path / target}/\n")
        names = {path.name for path in (tmp_path / target).iterdir()}
        assert names >= {expected, "hyperadapters_task.json", "hyperadapters_head.safetensors"}
    for target in ("peft-lora", "merged"):
        result = cli("export", lora_run, "--all", "--format", target, "--output", tmp_path / f"all-{target}")
        assert result.code == 0
        assert {path.name for path in (tmp_path / f"all-{target}").iterdir() if path.is_dir()} == {"mood", "tone"}


@pytest.mark.slow
def test_export_writes_all_tasks_for_the_runtime(cli: Cli, run: Path, tmp_path: Path) -> None:
    result = cli("export", run, "--format", "runtime", "--output", tmp_path / "out")
    assert (result.code, result.out, result.err) == (0, f"Written to {tmp_path / 'out'}/\n", "")
    assert Runtime(tmp_path / "out").tasks == tuple(task.name for task in HyperAdapterModel.from_pretrained(run).tasks)


def test_export_says_what_serving_engines_would_not_take(cli: Cli, lora_run: Path, tmp_path: Path) -> None:
    result = cli("export", lora_run, "--task", "mood", "--format", "peft-lora", "--output", tmp_path / "out")
    assert result.err == (
        "note: vLLM and LoRAX only serve LoRAs of decoder-only language models; this backbone is an encoder\n"
    )


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--task", "mood", "--format", "peft"], ["Unknown format 'peft'. Did you mean 'peft-lora'?", "adapterhub"]),
        (["--task", "moood", "--format", "onnx"], ["Unknown task 'moood'. Did you mean 'mood'?"]),
        (["--format", "onnx"], ["expected the name of a task (--task) or all tasks (--all), found neither"]),
        (
            ["--task", "mood", "--all", "--format", "onnx"],
            ["expected the name of a task (--task) or all tasks (--all), found both"],
        ),
        (["--task", "mood", "--format", "peft-lora"], ["train a model with model.form: lora"]),
        (
            ["--task", "mood", "--format", "runtime"],
            ["format 'runtime' has all tasks in one folder, found task 'mood'"],
        ),
        (["--format", "runtime", "--quantize", "int4"], ["Unknown quantization 'int4'", "Known: int8"]),
        (["--task", "mood", "--format", "onnx", "--quantize", "int8"], ["only format 'runtime' can be quantised"]),
    ],
)
def test_export_refuses_what_cannot_be(
    cli: Cli, run: Path, tmp_path: Path, arguments: list[str], messages: list[str]
) -> None:
    before = contents(tmp_path)
    assert_refused(cli("export", run, *arguments, "--output", tmp_path / "out"), *messages)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_export_replaces_nothing(cli: Cli, run: Path, tmp_path: Path) -> None:
    before = contents(run)
    assert_refused(cli("export", run, "--task", "mood", "--format", "adapterhub", "--output", run), str(run))
    assert contents(run) == before


# Help and version


def test_help_lists_the_commands(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(re.search(rf"^\W*{command}\s", result.out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert re.search(rf"^\s*Examples?\s+hyperadapters {command} ", result.out, re.MULTILINE)


def test_version_is_printed(cli: Cli) -> None:
    assert cli("--version") == (0, f"{__version__}\n", "")


def loaded_by(code: str) -> set[str]:
    """Those of the heavy packages that a new Python process has loaded after the code."""
    check = f"{code}\nimport sys; print('loaded', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_loads_none_of_the_heavy_packages(arguments: list[str]) -> None:
    code = f"""
import sys
from hyperadapters.cli import main
sys.argv = {["hyperadapters", *arguments]}
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    assert loaded_by(code) == set()


def test_import_of_the_package_loads_none_of_the_heavy_packages() -> None:
    assert loaded_by("import hyperadapters; hyperadapters.__version__; dir(hyperadapters)") == set()


def test_task_of_the_package_is_loaded_without_torch() -> None:
    assert "torch" not in loaded_by("from hyperadapters import Task; Task.classification('a', ['b', 'c'])")


def test_package_refuses_unknown_names() -> None:
    import hyperadapters

    with pytest.raises(AttributeError, match="module 'hyperadapters' has no attribute 'Tsk'"):
        _ = hyperadapters.Tsk


# Calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "a.yaml", "--outptu", "out"], "No such option"),
        (["train", "a.yaml"], "Missing option"),
        (["train", "--output", "out"], "Missing argument"),
        (["trian"], "No such command 'trian'"),
        (["predict", "run", "--input", "a.jsonl", "--batch-size", "0"], "--batch-size"),
        (["predict", "run", "--input", "a.jsonl", "--batch-size", "many"], "--batch-size"),
    ],
)
def test_wrong_call_ends_with_code_2(cli: Cli, arguments: list[str], message: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert message in result.err


# validate


def test_validate_counts_the_tasks(cli: Cli, recipe: Path, bert_folder: Path) -> None:
    assert cli("validate", recipe) == (0, f"{recipe}: 1 task on {bert_folder}\nvalid\n", "")


def test_validate_with_data_counts_the_rows(cli: Cli, recipe: Path) -> None:
    result = cli("validate", recipe, "--data", "--set", "data.n_validation=1")
    assert result.code == 0
    assert result.out.splitlines()[1:] == ["  mood: 4 train, 1 validation, 3 test, 2 labels", "valid"]


def test_validate_refuses_what_train_would_refuse(cli: Cli, recipe: Path) -> None:
    assert_refused(cli("validate", recipe, "--set", "data.n_trian=3"), "unknown key. Did you mean 'n_train'?")


def test_validate_reads_no_rows_unless_asked_to(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "train.jsonl").unlink()
    assert cli("validate", recipe).code == 0
    result = cli("validate", recipe, "--data")
    assert result.code == 2
    assert "train.jsonl: no such file" in result.err
    assert "valid\n" not in result.out


# train


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"sed": 1}, ["mood.yaml: 1 fault\n", "sed: unknown key. Did you mean 'seed'?"]),
        ({"training": {}}, ["training: expected exactly one of max_steps, num_train_epochs"]),
        ({"tasks": []}, ["expected at least one task"]),
        (
            {"tasks": [{"name": "mood", "source": {"demo": "message_spam"}}] * 2},
            ["task names must be different", "'mood'"],
        ),
        ({"tasks": [{"name": "a", "source": {"path": "gone.csv"}}]}, ["gone.csv: no such file"]),
        ({"backbone": "./gone"}, ["gone' cannot be loaded"]),
        ({"model": {"feature_layer": 9}}, ["feature_layer: expected 0 to 3", "found 9"]),
        ({"model": {"preset": "official"}}, ["preset 'official' is for encoder-decoder backbones"]),
        (
            {"tasks": [{"name": "a", "kind": "text-to-text", "source": {"demo": "message_spam"}}]},
            ["task 'a' is text-to-text, which needs an encoder-decoder backbone"],
        ),
    ],
)
def test_train_refuses_a_wrong_recipe(
    cli: Cli, tmp_path: Path, recipe: Path, bert_folder: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    write_recipe(recipe, **{**values_of(bert_folder), **changes})
    assert_refused(cli("train", recipe, "--output", tmp_path / "out"), *messages)
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_missing_recipe(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    result = cli("train", recipe.with_name("moood.yaml"), "--output", tmp_path / "out")
    assert_refused(result, "moood.yaml: no such recipe. Did you mean", "/mood.yaml'?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("override", ["data.n_trian=3", "seed", "seed=soon", "seed=[1"])
def test_train_refuses_a_wrong_override(cli: Cli, tmp_path: Path, recipe: Path, override: str) -> None:
    assert_refused(cli("train", recipe, "--output", tmp_path / "out", "--set", override))
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_missing_data_file(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "data" / "train.jsonl").rename(tmp_path / "data" / "trains.jsonl")
    result = cli("train", recipe, "--output", tmp_path / "out")
    assert_refused(result, "train.jsonl: no such file. Did you mean", "trains.jsonl'?")
    assert not (tmp_path / "out").exists()


def test_train_refuses_an_unknown_label_with_file_and_line(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    write_rows(tmp_path / "data", test=[("good", "yes"), ("good", "yess")])
    result = cli("train", recipe, "--output", tmp_path / "out")
    assert_refused(result, "test.jsonl, line 2: unknown label 'yess' of task 'mood'. Did you mean 'yes'?")
    assert not (tmp_path / "out").exists()


def test_train_refuses_labels_in_the_data_that_do_not_fit_the_metric(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    write_rows(
        tmp_path / "data", train=[("w1", "a"), ("w2", "b"), ("w3", "c")], validation=[("w1", "a")], test=[("w1", "a")]
    )
    values = yaml.safe_load(recipe.read_text())
    values["tasks"][0] |= {"labels": [], "metrics": ["f1"]}
    result = cli("train", write_recipe(recipe, **values), "--output", tmp_path / "out")
    assert_refused(result, "f1 requires two labels, found 3; use macro_f1")
    assert not (tmp_path / "out").exists()


def test_train_refuses_an_unknown_architecture(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    OPTConfig().save_pretrained(tmp_path / "opt")
    result = cli("train", recipe, "--output", tmp_path / "out", "--set", f"backbone={tmp_path / 'opt'}")
    assert_refused(result, "Unknown architecture 'opt'", "Known: ", "bert")
    assert not (tmp_path / "out").exists()


def test_a_run_with_relative_paths_is_used_from_elsewhere(
    cli: Cli, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(recipe, **values_of(Path("bert")))  # which is in the working directory
    monkeypatch.chdir(tmp_path)
    assert cli("train", "recipes/mood.yaml", "--output", "runs/mood/").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("evaluate", "../runs/mood").code == 0


def test_train_writes_to_what_a_link_points_to(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name, target in (("link", "disk"), ("dangling", "disk/new")):
        (tmp_path / name).symlink_to(target)
        assert cli("train", recipe, "--output", tmp_path / name).code == 0
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target / "hyperadapter.json").is_file()
        if name == "link":
            shutil.rmtree(tmp_path / "disk")
            (tmp_path / "disk").mkdir()


@pytest.mark.parametrize("name", ["n" * 300, "loop", "loop/run", "texts.jsonl/run", "null"])
def test_train_and_export_refuse_what_cannot_be_a_folder(
    cli: Cli, tmp_path: Path, recipe: Path, lora_run: Path, texts: Path, name: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_refused(cli("train", recipe, "--output", tmp_path / name))
    assert_refused(cli("export", lora_run, "--task", "mood", "--format", "peft-lora", "--output", tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["null", "link.jsonl", "dangling.jsonl"])
def test_predict_and_evaluate_write_to_links_and_devices(
    cli: Cli, tmp_path: Path, run: Path, texts: Path, name: str
) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "null").symlink_to("/dev/null")
    for ending in ("jsonl", "json"):
        (tmp_path / f"link.{ending}").symlink_to("old")
        (tmp_path / f"dangling.{ending}").symlink_to("new")
    for command in ("predict", "evaluate"):
        output = tmp_path / (name if command == "predict" else name.replace(".jsonl", ".json"))
        assert read_run(cli, command, run, texts, output).code == 0
        assert output.is_symlink()
        if name != "null":
            json.loads(output.read_text().splitlines()[0] if command == "predict" else output.read_text())
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["n" * 300, "loop"])
def test_predict_and_evaluate_refuse_what_cannot_be_a_file(
    cli: Cli, tmp_path: Path, run: Path, texts: Path, name: str
) -> None:
    for command, ending in (("predict", ".jsonl"), ("evaluate", ".json")):
        path = tmp_path / f"{name}{ending}"
        if name == "loop":
            path.symlink_to(path)
        assert_refused(read_run(cli, command, run, texts, path), "cannot be written")


def test_train_refuses_a_folder_that_holds_a_run(cli: Cli, recipe: Path, run: Path) -> None:
    before = contents(run)
    assert_refused(cli("train", recipe, "--output", run), "already contains a run", "--overwrite", "--resume")
    assert contents(run) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"]])
def test_train_refuses_a_folder_with_foreign_files(cli: Cli, tmp_path: Path, recipe: Path, options: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    result = cli("train", recipe, "--output", tmp_path / "out", *options)
    assert_refused(result, "expected an empty or new folder, or the folder of a run; found other files in it")
    assert contents(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_train_refuses_a_file_as_folder(cli: Cli, texts: Path, recipe: Path) -> None:
    before = texts.read_bytes()
    assert_refused(cli("train", recipe, "--output", texts), "expected a folder, found a file")
    assert texts.read_bytes() == before


def test_train_refuses_a_folder_that_cannot_be_made(cli: Cli, texts: Path, recipe: Path) -> None:
    before = texts.read_bytes()
    assert_refused(cli("train", recipe, "--output", texts / "out"), str(texts / "out"))
    assert texts.read_bytes() == before


def test_resume_without_a_run_is_refused(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    assert_refused(cli("train", recipe, "--output", tmp_path / "out", "--resume"), "nothing to resume")
    assert not (tmp_path / "out").exists()


def test_resume_of_a_finished_run_is_refused(cli: Cli, recipe: Path, run: Path) -> None:
    (run / "metrics.json").write_text("{}")
    before = contents(run)
    assert_refused(cli("train", recipe, "--output", run, "--resume"), "nothing to resume: the run has finished")
    assert contents(run) == before


def test_resume_and_overwrite_exclude_each_other(cli: Cli, recipe: Path, run: Path) -> None:
    before = contents(run)
    result = cli("train", recipe, "--output", run, "--resume", "--overwrite")
    assert_refused(result, "--resume and --overwrite exclude each other")
    assert contents(run) == before


@pytest.mark.parametrize("override", ["backbone=/gone/model", "model.feature_layer=9", "seed=soon"])
def test_overwrite_keeps_the_earlier_run_when_the_new_one_cannot_start(
    cli: Cli, recipe: Path, run: Path, override: str
) -> None:
    before = contents(run)
    assert_refused(cli("train", recipe, "--output", run, "--overwrite", "--set", override))
    assert contents(run) == before


# Checkpoints


def read_run(cli: Cli, command: str, run: Path, texts: Path, output: Path) -> Result:
    inputs = ["--input", texts] if command == "predict" else []
    return cli(command, run, *inputs, "--output", output)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (damaged_runs.nothing_there, ["no checkpoint here; expected a file hyperadapter.json"]),
        (damaged_runs.folder_gone, ["no checkpoint here"]),
        (damaged_runs.weights_gone, [".safetensors: the weights cannot be read"]),
        (damaged_runs.weights_truncated, ["expected sha256", "truncated or altered"]),
        (damaged_runs.weights_altered, ["expected sha256", "truncated or altered"]),
        (damaged_runs.json_truncated, ["hyperadapter.json: not readable", "the checkpoint is damaged"]),
        (damaged_runs.json_altered, ["hyperadapter.json was altered after it was written"]),
        (
            damaged_runs.json_unknown_key,
            ["hyperadapter.json: 1 fault\n", "modle: unknown key. Did you mean 'model'?"],
        ),
        (damaged_runs.json_newer, ["has format 99", "upgrade"]),
        (damaged_runs.json_points_outside, ["names no weights file in this folder"]),
        (damaged_runs.backbone_replaced, ["was trained on backbone", "with fingerprint", "found one with"]),
        (damaged_runs.backbone_gone, ["bert' cannot be loaded", "there is no such folder; put it back there"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_checkpoint_is_refused(
    cli: Cli,
    tmp_path: Path,
    run: Path,
    texts: Path,
    command: str,
    damage: Callable[[Path], None],
    messages: list[str],
) -> None:
    damage(run)
    output = tmp_path / ("result.jsonl" if command == "predict" else "result.json")
    assert_refused(read_run(cli, command, run, texts, output), *messages)
    assert not output.exists()


# predict


def test_predict_prints_one_json_object_a_row(cli: Cli, run: Path, texts: Path) -> None:
    result = cli("predict", run, "--input", texts, "--task", "mood")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0
    assert [record["text"] for record in records] == ["good w1", "bad w2"]
    assert all(record["task"] == "mood" and not record["routed"] for record in records)
    assert all(record["answer"] == max(record["probabilities"], key=record["probabilities"].get) for record in records)


def test_predict_writes_the_file_it_is_asked_for(cli: Cli, tmp_path: Path, run: Path, texts: Path) -> None:
    result = cli("predict", run, "--input", texts, "--output", tmp_path / "answers.csv")
    assert (result.code, result.out) == (0, "")
    header, *rows = (tmp_path / "answers.csv").read_text().splitlines()
    assert header == "text,text_pair,task,routed,answer,probabilities,output,similarity,margin,candidates"
    assert [row.split(",")[0] for row in rows] == ["good w1", "bad w2"]
    assert all(row.split(",")[3] == "True" for row in rows)


def test_predict_answers_several_tasks_for_each_row(cli: Cli, tmp_path: Path, run: Path, texts: Path) -> None:
    output = tmp_path / "answers.jsonl"
    for chosen in (["--tasks", "mood"], ["--tasks", "*"]):
        result = cli("predict", run, "--input", texts, "--output", output, *chosen)
        assert (result.code, result.out) == (0, "")
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(record["text"], record["task"]) for record in records] == [("good w1", "mood"), ("bad w2", "mood")]
        assert not any(record["routed"] for record in records)
    result = cli("predict", run, "--input", texts, "--tasks", "mood", "--task", "mood")
    assert_refused(result, "task and tasks: expected one of them, found both")
    assert_refused(cli("predict", run, "--input", texts, "--tasks", "mod"), "Unknown task 'mod'. Did you mean 'mood'?")


def test_predict_refuses_an_unknown_task(cli: Cli, tmp_path: Path, run: Path, texts: Path) -> None:
    result = cli("predict", run, "--input", texts, "--task", "mod", "--output", tmp_path / "answers.jsonl")
    assert_refused(result, "Unknown task 'mod'. Did you mean 'mood'? Known: mood.")
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        ('{"text": "a"}\n{"text": "b", "task": "mod"}\n', ["line 2: Unknown task 'mod'. Did you mean 'mood'?"]),
        ('{"text": "a", "task": ["mood"]}\n', ["line 1: Unknown task"]),
        ('{"sentence": "a"}\n', ["line 1: no column 'text'. Found: sentence."]),
        ('{"text": "a"}\n{"text": 3}\n', ["line 2: expected a string in 'text', found 3"]),
        ('{"text": "a", "text_pair": 3}\n', ["line 1: expected a string in 'text_pair', found 3"]),
        ('{"text": "a"}\nb\n', ["line 2: expected a JSON object on each line"]),
        ('{"text": "half \\ud83d"}\n', ["line 1: 'text' is not valid Unicode"]),
        ("", ["expected at least one row, found none"]),
    ],
)
def test_predict_refuses_wrong_rows(
    cli: Cli, tmp_path: Path, run: Path, texts: Path, rows: str, messages: list[str]
) -> None:
    texts.write_text(rows)
    result = cli("predict", run, "--input", texts, "--output", tmp_path / "answers.jsonl")
    assert_refused(result, "texts.jsonl", *messages)
    assert not (tmp_path / "answers.jsonl").exists()


def test_predict_refuses_a_missing_input(cli: Cli, tmp_path: Path, run: Path, texts: Path) -> None:
    result = cli("predict", run, "--input", texts.with_name("text.jsonl"), "--output", tmp_path / "answers.jsonl")
    assert_refused(result, "text.jsonl: no such file. Did you mean", "texts.jsonl'?")
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize("name", ["answers.parquet", "answers", "answers.json"])
def test_predict_refuses_an_output_of_another_ending(
    cli: Cli, tmp_path: Path, run: Path, texts: Path, name: str
) -> None:
    result = cli("predict", run, "--input", texts, "--output", tmp_path / name)
    assert_refused(result, f"{name}: expected a name ending in .jsonl or .csv")
    assert not (tmp_path / name).exists()


def test_predict_refuses_an_output_in_a_folder_that_does_not_exist(
    cli: Cli, tmp_path: Path, run: Path, texts: Path
) -> None:
    result = cli("predict", run, "--input", texts, "--output", tmp_path / "gone" / "answers.jsonl")
    assert_refused(result, "gone does not exist; create it first")
    assert not (tmp_path / "gone").exists()


def test_predict_keeps_an_earlier_output_when_it_fails(cli: Cli, tmp_path: Path, run: Path, texts: Path) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("earlier\n")
    assert_refused(cli("predict", run, "--input", texts, "--task", "mod", "--output", output))
    assert output.read_text() == "earlier\n"


# evaluate


def test_evaluate_prints_and_writes_the_scores(cli: Cli, tmp_path: Path, run: Path) -> None:
    result = cli("evaluate", run, "--split", "validation", "--output", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert result.code == 0
    assert "accuracy" in result.out
    assert scores["tasks"]["mood"].keys() == scores["mean"].keys() == {"validation"}


def test_evaluate_refuses_an_unknown_split(cli: Cli, tmp_path: Path, run: Path) -> None:
    result = cli("evaluate", run, "--split", "tset", "--output", tmp_path / "scores.json")
    assert_refused(result, "Unknown split 'tset'. Did you mean 'test'? Known: test, train, validation.")
    assert not (tmp_path / "scores.json").exists()


def test_evaluate_refuses_a_split_without_rows(cli: Cli, tmp_path: Path, run: Path) -> None:
    path = run / "resolved_recipe.yaml"
    path.write_text(path.read_text().replace("../data/{split}.jsonl", "{train: ../data/train.jsonl}"))
    result = cli("evaluate", run, "--output", tmp_path / "scores.json")
    assert_refused(result, "expected test rows in the recipe")
    assert not (tmp_path / "scores.json").exists()


def test_evaluate_refuses_a_checkpoint_without_a_recipe(cli: Cli, tmp_path: Path, run: Path) -> None:
    (run / "resolved_recipe.yaml").unlink()
    result = cli("evaluate", run, "--output", tmp_path / "scores.json")
    assert_refused(result, "expected a file resolved_recipe.yaml beside the checkpoint")
    assert not (tmp_path / "scores.json").exists()


def test_evaluate_refuses_a_recipe_of_other_tasks(cli: Cli, tmp_path: Path, run: Path, bert_folder: Path) -> None:
    other = {"name": "mood", "labels": ["yes", "no"], "source": {"path": "../data/{split}.jsonl"}}
    write_recipe(run / "resolved_recipe.yaml", **values_of(bert_folder, tasks=[other]))
    result = cli("evaluate", run, "--output", tmp_path / "scores.json")
    assert_refused(result, "differs from that of the checkpoint")
    assert not (tmp_path / "scores.json").exists()


def test_evaluate_refuses_an_output_in_a_folder_that_does_not_exist(cli: Cli, tmp_path: Path, run: Path) -> None:
    result = cli("evaluate", run, "--output", tmp_path / "gone" / "scores.json")
    assert result.code == 2
    assert "gone/scores.json" in result.err
    assert not (tmp_path / "gone").exists()


# demo


def test_demo_refuses_a_folder_with_foreign_files(cli: Cli, tmp_path: Path, texts: Path) -> None:
    before = contents(tmp_path)
    result = cli("demo", "--output", texts.parent)
    assert result.code == 2
    assert "found other files in it" in result.err
    assert contents(tmp_path) == before


# failures that are nobody's input


def test_a_missing_package_is_a_failure_and_not_a_wrong_call(cli: Cli, tmp_path: Path, recipe: Path) -> None:
    result = cli("train", recipe, "--output", tmp_path / "out", "--set", "training.report_to=[comet_ml]")
    assert result.code == 1
    assert "package of 'comet_ml' is not installed" in result.err
    assert not (tmp_path / "out").exists()


def test_an_unexpected_exception_ends_with_exit_code_1(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['hyperadapters', 'validate', 'x.yaml']\n"
        "import hyperadapters.config as config, hyperadapters.cli as cli\n"
        "config.load_recipe = lambda *_: 1 / 0\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


# Plan


def test_plan_prints_the_parts_and_the_total(cli: Cli, recipe: Path) -> None:
    result = cli("plan", recipe)
    assert result.code == 0
    assert re.search(r"backbone\W+0\.0 MiB", result.out)
    assert re.search(r"total\W+\d+\.\d MiB", result.out)
    assert "Largest batch of a process: 4 rows of 3 tokens." in result.out
    assert "Largest part that the recipe can change: " in result.out


def test_plan_prints_json_and_writes_nothing(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = cli("plan", recipe, "--json", "--set", "training.batch_size=2", "--processes", "2")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["total"] == sum(found["parts"].values())
    assert (found["processes"], found["rows"]) == (2, 1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "training.batch_sise=2"], "training.batch_sise"),
        (["--processes", "3"], "training.batch_size: expected a multiple of the number of processes"),
        (["--set", "backbone=nowhere"], "backbone 'nowhere' cannot be loaded"),
    ],
)
def test_plan_refuses_what_train_would_refuse(cli: Cli, recipe: Path, options: list[str], message: str) -> None:
    assert_refused(cli("plan", recipe, *options), message)
