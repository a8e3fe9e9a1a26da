"""Training by the command line on tiny models: what it writes, that it learns, resumes, and repeats itself."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import save_backbone
from other_processes import start_command

from hyperadapters import cli
from hyperadapters.checkpoints.details_file import read_details
from hyperadapters.config import Recipe, load_recipe, parse
from hyperadapters.data.loading import load_tasks
from hyperadapters.errors import (
    CheckpointError,
    HyperAdaptersError,
    InterruptionError,
    MissingPackageError,
    OutOfMemoryError,
    OutputError,
    RecipeError,
)
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.report.runs import read_run
from hyperadapters.training.run import remove_run, train
from hyperadapters.training.trainer import Trainer

SIXTY_STEPS = ["training.max_steps=60"]


def write_tasks(folder: Path, rows: int = 96) -> list[dict[str, Any]]:
    """Three tasks that a random encoder can learn: a word decides the label, its number the size."""
    generator = random.Random(0)

    def fillers(low: int, high: int) -> list[str]:
        return [f"w{generator.randrange(low, high)}" for _ in range(2)]

    def row(task: str) -> dict[str, Any]:
        if task == "colour":
            word = generator.choice(["red", "blue"])
            return {"text": " ".join([word, word, *fillers(0, 10)]), "label": word}
        if task == "mood":
            word = generator.choice(["good", "bad"])
            return {"text": " ".join(fillers(10, 20)), "text_pair": f"{word} {word} {word}", "label": word}
        size = generator.randrange(5)
        return {"text": " ".join(["yes"] * size + ["no"] * (4 - size) + fillers(20, 30)), "label": 10.0 * size}

    entries: list[dict[str, Any]] = []
    for name in ("colour", "mood", "size"):
        for split, count in (("train", rows), ("validation", 12), ("test", 20)):
            lines = [json.dumps(row(name)) for _ in range(count)]
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
        entry: dict[str, Any] = {"name": name, "source": {"path": f"{name}-{{split}}.jsonl"}}
        if name == "mood":
            entry["fields"] = ["text", "text_pair"]
        if name == "size":
            entry["kind"] = "regression"
        entries.append(entry)
    return entries


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe for the three tasks on a tiny BERT; changes are merged into it."""
    recipe: dict[str, Any] = {
        "backbone": f"./{save_backbone(folder / 'backbone', 'bert', initializer_range=0.3, hidden_size=32).name}",
        "model": {"adapter_dim": 4, "feature_layer": 1},
        "data": {"max_length": 32},
        "training": {
            "max_steps": 200,
            "batch_size": 16,
            "learning_rate": 0.001,
            "head_learning_rate": 0.01,
            "warmup_steps": 5,
            "eval_steps": 20,
            "logging_steps": 10,
        },
        "tasks": write_tasks(folder),
    }
    for section, values in changes.items():
        recipe[section] = {**recipe[section], **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["hyperadapters", *map(str, arguments)])
    cli.main()


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command(monkeypatch, *arguments)
    assert not exit_info.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(load_recipe(write_recipe(folder)), folder / "run")
    return folder


def test_train_writes_the_checkpoint_the_recipe_and_the_metrics_and_nothing_else(trained: Path) -> None:
    names = {path.name.split("-")[0] for path in (trained / "run").iterdir()}
    files = {"README.md", "adapters", "details.json", "hyperadapter.json", "metrics.json", "resolved_recipe.yaml"}
    assert names == files


def test_metrics_have_their_documented_shape_and_show_that_it_learned(trained: Path) -> None:
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    names = ("tasks", "calibration", "mean", "routing_accuracy", "trainable_parameters", "seconds")
    assert metrics.keys() == set(names)
    assert metrics["calibration"].keys() == {"colour", "mood"}
    assert metrics["calibration"]["mood"].keys() == {"validation", "test"}
    assert metrics["tasks"].keys() == {"colour", "mood", "size"}
    assert metrics["tasks"]["size"].keys() == {"validation", "test"}
    assert metrics["tasks"]["size"]["test"].keys() == {"pearson"}
    test_scores = [next(iter(scores["test"].values())) for scores in metrics["tasks"].values()]
    assert metrics["mean"]["test"] == pytest.approx(sum(test_scores) / 3)
    assert metrics["mean"]["test"] > 0.85
    assert metrics["routing_accuracy"] > 0.8
    model = HyperAdapterModel.from_pretrained(trained / "run")
    assert metrics["trainable_parameters"] == model.num_trainable_parameters()


def test_the_details_agree_with_the_metrics_and_the_data(trained: Path) -> None:
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    details = read_details(trained / "run")
    rows = {"train": 96, "validation": 12, "test": 20}
    assert [(task.name, task.rows) for task in details.tasks] == [(name, rows) for name in ("colour", "mood", "size")]
    assert details.split == "test"
    for task in details.tasks:
        for name, bins in (("", task.reliability), ("_before", task.reliability_before)):
            if task.name == "size":
                assert bins == ()
                continue
            error = sum(found.rows * abs(found.confidence - found.accuracy) for found in bins) / 20
            expected = metrics["calibration"][task.name]["test"][f"calibration_error{name}"]
            assert error == pytest.approx(expected, rel=1e-6, abs=1e-9)
            accuracy = metrics["tasks"][task.name]["test"]["accuracy"]
            assert (task.risk.x[-1], task.risk.y[-1]) == pytest.approx((1.0, 1 - accuracy))
    assert sum(count for _, _, count in details.confusion) == 60
    right = sum(count for own, nearest, count in details.confusion if own == nearest)
    assert right / 60 == pytest.approx(metrics["routing_accuracy"])
    written = [json.loads(line) for line in (trained / "colour-test.jsonl").read_text().splitlines()]
    assert [(point.text, point.target) for point in details.points[:20]] == [(r["text"], r["label"]) for r in written]
    assert details.points[20].text.count(" / ") == 1  # of a pair
    lengths = [sum(value**2 for value in vector) for vector in (details.points[0].vector, details.prototypes[0])]
    assert lengths == pytest.approx([1, 1], abs=1e-3)
    assert details.losses["total"].x == tuple(map(float, range(10, 201, 10)))
    terms = [details.losses[name].y[-1] for name in ("task", "instance", "prototype")]
    assert details.losses["total"].y[-1] == pytest.approx(sum(terms), rel=1e-4)
    assert details.validation_mean.x == tuple(map(float, range(20, 201, 20)))
    best = details.validation_mean.y[details.validation_mean.x.index(float(details.best_step or 0))]
    assert best == max(details.validation_mean.y)
    assert details.validation["mood"].y[-1] <= 1
    trainable = sum(count for part, count in details.parameters.items() if part != "backbone")
    assert trainable == metrics["trainable_parameters"]
    assert sum(details.seconds.values()) >= details.seconds["training steps"] > 0
    assert read_run(trained / "run").metrics.tasks == metrics["tasks"]


def test_evaluate_gives_the_scores_that_train_wrote(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(monkeypatch, "evaluate", trained / "run", "--output", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    assert scores["mean"]["test"] == pytest.approx(metrics["mean"]["test"], abs=1e-6)
    assert scores["routing_accuracy"] == metrics["routing_accuracy"]
    assert "colour" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_predict_answers_in_order_with_and_without_tasks(
    trained: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"text": "red red w1 w2", "task": "colour"},
        {"text": "w11 w12", "text_pair": "bad bad bad"},
        {"text": "yes yes yes yes w21 w22", "task": "size"},
        {"text": "blue blue w5 w6"},
        {"text": "no no no no w21 w22", "task": "size"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / f"out.{ending}"
    _run(monkeypatch, "predict", trained / "run", "--input", tmp_path / "in.jsonl", "--output", output)
    if ending == "csv":
        import csv

        found = list(csv.DictReader(output.open(newline="")))
    else:
        found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert [str(row["routed"]).lower() for row in found] == ["false", "true", "false", "true", "false"]
    assert [row["task"] for row in found] == ["colour", "mood", "size", "colour", "size"]
    assert [row["answer"] for row in found[:2]] == ["red", "bad"]
    assert float(found[2]["answer"]) > float(found[4]["answer"]) + 5.0
    assert found[3]["answer"] == "blue"


def test_predict_to_the_screen_with_the_task_told(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("text\nred red w1 w2\nblue blue w5 w6\n")
    _run(monkeypatch, "predict", trained / "run", "--input", tmp_path / "in.csv", "--task", "colour")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["answer"] for row in found] == ["red", "blue"]
    assert all(not row["routed"] and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in found)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["training.max_steps=10"])
    other = recipe.model_copy(update={"seed": 1})
    runs = [train(r, tmp_path / f"run{i}") for i, r in enumerate((recipe, recipe, other))]
    weights = [run.model.method.prototypes.weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.fixture(scope="module")
def weights_of_60_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    return train(load_recipe(write_recipe(folder), SIXTY_STEPS), folder / "run").model.adapter_state_dict()


def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_of_60_steps: dict[str, torch.Tensor]
) -> None:
    recipe = load_recipe(write_recipe(tmp_path), SIXTY_STEPS)
    _interrupted(recipe, tmp_path / "broken", 47, monkeypatch)
    with pytest.raises(OutputError, match="already contains a run; use --overwrite to replace it, or train --resume"):
        train(recipe, tmp_path / "broken")
    resumed = train(recipe, tmp_path / "broken", resume=True)
    for name, value in weights_of_60_steps.items():
        assert torch.equal(resumed.model.adapter_state_dict()[name], value), name
    with pytest.raises(OutputError, match="nothing to resume: the run has finished"):
        train(recipe, tmp_path / "broken", resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_the_state_and_the_run_is_resumed_bit_for_bit(tmp_path: Path, number: int) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["training.max_steps=50"])
    whole = train(recipe, tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(InterruptionError, match=r"SIG(TERM|INT) after step 33, .* --resume continues") as ended:
        _at_step(33, lambda: signal.raise_signal(number), lambda: train(recipe, tmp_path / "ended"))
    assert ended.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert (tmp_path / "ended" / "checkpoint-33").is_dir()
    assert not (tmp_path / "ended" / "metrics.json").exists()
    resumed = train(recipe, tmp_path / "ended", resume=True)
    for name, value in whole.model.adapter_state_dict().items():
        assert torch.equal(resumed.model.adapter_state_dict()[name], value), name


def test_a_damaged_state_is_named_and_the_one_before_is_offered(
    tmp_path: Path, weights_of_60_steps: dict[str, torch.Tensor]
) -> None:
    recipe, run = load_recipe(write_recipe(tmp_path), SIXTY_STEPS), tmp_path / "run"
    with pytest.raises(InterruptionError):
        _at_step(47, lambda: signal.raise_signal(signal.SIGTERM), lambda: train(recipe, run))
    state = run / "checkpoint-47"
    files = [path for path in state.iterdir() if path.is_file()]
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "hyperadapter.json"} < {path.name for path in files}
    for path in files:
        contents = path.read_bytes()
        damages = [contents[: len(contents) // 2], contents[:-1] + bytes([contents[-1] ^ 1])]
        for damaged in damages if path.name != "files.json" else damages[:1]:
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"{path.name}: .*to continue from checkpoint-40"):
                train(recipe, run, resume=True)
        path.write_bytes(contents)
    (state / "files.json").unlink()
    (state / "trainer_state.json").write_text("{")  # as if the process had been killed while it wrote the state
    resumed = train(recipe, run, resume=True)
    for name, value in weights_of_60_steps.items():
        assert torch.equal(resumed.model.adapter_state_dict()[name], value), name


def test_a_second_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    path, run = write_recipe(tmp_path, training={"max_steps": 40, "eval_steps": 2}), tmp_path / "run"
    first = start_command("train", path, "--output", run)
    while not any(run.glob("checkpoint-*")):
        assert first.is_alive()
    with pytest.raises(OutputError, match="another process is writing to this folder"):
        train(load_recipe(path), run, overwrite=True)
    first.join()
    assert first.exitcode == 0
    assert HyperAdapterModel.from_pretrained(run).tasks


def test_a_batch_that_needs_too_much_memory_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    message = r"training step 2: the memory of 'cpu' does not suffice for a batch of 1\d rows of \d+ tokens; lower"
    with pytest.raises(OutOfMemoryError, match=message):
        _at_step(2, lambda: torch.empty(2**46), lambda: train(recipe, tmp_path / "run"))


def test_a_batch_size_that_fits_is_found(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["training.max_steps=4", "training.auto_batch=true"])
    real, sizes = Trainer.compute_loss, []

    def limited(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        torch.empty(2**46 if sizes[-1] > 5 else 1)
        return real(self, model, inputs, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", limited)
        train(recipe, tmp_path / "run")
    assert max(sizes[-4:]) <= 5 < max(sizes)


def _at_step(step: int, action: Callable[[], object], run: Callable[[], object]) -> None:
    """Do something during a step of a training."""
    real, steps = Trainer.compute_loss, 0

    def acting(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            action()
        return real(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", acting)
        run()


def test_overwrite_replaces_a_run_and_keeps_other_files(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["training.max_steps=5"])
    train(recipe, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    model = HyperAdapterModel.from_pretrained(tmp_path / "run")
    model.tokenizer.model_max_length = 7
    model.save_pretrained(tmp_path / "run")
    assert list((tmp_path / "run").glob("tokenizer-*"))
    remove_run(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"README.md", "notes.txt"}
    model.save_pretrained(tmp_path / "run")
    train(recipe.model_copy(update={"seed": 3}), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert load_recipe(tmp_path / "run" / "resolved_recipe.yaml").seed == 3
    assert len(list((tmp_path / "run").glob("adapters-*"))) == 1


def test_the_best_checkpoint_is_kept_and_training_stops_early(tmp_path: Path) -> None:
    """A learning rate that destroys what was learned: the kept state is that of the best evaluation."""
    recipe = load_recipe(
        write_recipe(tmp_path),
        [
            "training.max_steps=400",
            "training.early_stopping_patience=2",
            "training.eval_steps=10",
            "model.head_inputs=adapted",  # other heads are fitted after the best state was chosen
        ],
    )
    from hyperadapters.backbones.loading import load_backbone
    from hyperadapters.training.run import rows_by_task, training_arguments
    from hyperadapters.training.trainer import Trainer

    tasks = load_tasks(recipe.tasks, recipe.data, recipe.seed)
    model = HyperAdapterModel(
        load_backbone(recipe.backbone), [data.task for data in tasks], recipe.model, recipe.backbone
    )
    trainer = Trainer(
        model,
        rows_by_task(tasks, "train"),
        rows_by_task(tasks, "validation"),
        training_arguments(recipe, tmp_path / "trainer"),
    )
    trainer.train()
    means = [entry["eval_mean"] for entry in trainer.state.log_history if "eval_mean" in entry]
    assert trainer.state.global_step < 400
    assert trainer.evaluate()["eval_mean"] == pytest.approx(max(means))
    terms = next(entry for entry in trainer.state.log_history if "loss_task" in entry)
    assert terms["loss"] == pytest.approx(
        terms["loss_task"] + terms["loss_instance"] + terms["loss_prototype"], rel=1e-2
    )


def test_the_log_goes_to_tensorboard_by_report_to_and_stays(tmp_path: Path) -> None:
    settings = ["max_steps=4", "eval_steps=2", "logging_steps=2", "report_to=[tensorboard]"]
    recipe = load_recipe(write_recipe(tmp_path), [f"training.{setting}" for setting in settings])
    train(recipe, tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(log)).Reload()
    names = {name for name in events.Tags()["scalars"] if not re.match(r"(train|eval)/(train_|total_|epoch)", name)}
    losses = {"loss", *(f"loss_{term}" for term in ("task", "instance", "prototype"))}
    losses |= {f"task_loss_{task}" for task in ("colour", "mood", "size")}
    scores = {"mean", "routing_accuracy", "colour_accuracy", "mood_accuracy", "size_pearson"}
    expected = {f"train/{name}" for name in (*losses, "learning_rate", "grad_norm")}
    assert names == expected | {f"eval/{name}" for name in scores}
    assert [event.step for event in events.Scalars("train/task_loss_mood")] == [2, 4]
    train(recipe, tmp_path / "run", overwrite=True)
    assert len(list((tmp_path / "run" / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("training.report_to=[wandbb]", RecipeError, "Unknown logger 'wandbb'. Did you mean 'wandb'"),
        ("training.report_to=[comet_ml]", MissingPackageError, "package of 'comet_ml' is not installed"),
        ("training={max_steps: 5, fp16: true, bf16: true}", RecipeError, r"training: .*fp16"),
        ("data.max_length=500", RecipeError, "the backbone takes at most 80 tokens, found 500; lower it"),
    ],
)
def test_overwrite_keeps_the_earlier_run_when_the_new_one_cannot_start(
    tmp_path: Path, setting: str, error: type[HyperAdaptersError], message: str
) -> None:
    path = write_recipe(tmp_path)
    train(load_recipe(path, ["training.max_steps=3"]), tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(error, match=message):
        train(load_recipe(path, [setting]), tmp_path / "run", overwrite=True)
    with pytest.raises(error, match=message):
        train(load_recipe(path, [setting]), tmp_path / "new")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before
    assert not (tmp_path / "new").exists()


def _interrupted(recipe: Recipe, folder: Path, at_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = Trainer.compute_loss, 0

    def dying(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == at_step:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_loss", dying)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder)


def test_a_run_is_not_resumed_with_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path)
    _interrupted(load_recipe(path), tmp_path / "run", 30, monkeypatch)
    values = yaml.safe_load(path.read_text())
    values["tasks"].reverse()
    values["seed"] = 4
    path.write_text(yaml.safe_dump(values))
    before = (tmp_path / "run" / "resolved_recipe.yaml").read_bytes()
    with pytest.raises(OutputError, match="the run was started with another recipe, which differs in seed, tasks"):
        train(load_recipe(path), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "resolved_recipe.yaml").read_bytes() == before
    for content, message in (("[" * 1000, "cannot be read: "), ("- a", "expected a recipe, found list")):
        (tmp_path / "run" / "resolved_recipe.yaml").write_text(content)
        with pytest.raises(OutputError, match=f"resolved_recipe.yaml: {message}"):
            train(load_recipe(path), tmp_path / "run", resume=True)


@pytest.mark.parametrize("died", ["while writing a checkpoint", "before the first checkpoint"])
def test_a_run_that_died_at_a_bad_moment_resumes_to_the_same_weights(
    tmp_path: Path, died: str, monkeypatch: pytest.MonkeyPatch, weights_of_60_steps: dict[str, torch.Tensor]
) -> None:
    recipe = load_recipe(write_recipe(tmp_path), SIXTY_STEPS)
    _interrupted(recipe, tmp_path / "run", 47 if "while" in died else 5, monkeypatch)
    if "while" in died:
        for name in ("files.json", "trainer_state.json", "hyperadapter.json"):
            (tmp_path / "run" / "checkpoint-40" / name).unlink()
    resumed = train(recipe, tmp_path / "run", resume=True)
    for name, value in weights_of_60_steps.items():
        assert torch.equal(resumed.model.adapter_state_dict()[name], value), name


def test_a_run_that_is_killed_while_it_writes_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    """The process is killed as soon as a new state appears, so that one or the other file is only half there."""
    path, run = write_recipe(tmp_path, training={"max_steps": 60, "eval_steps": 5}), tmp_path / "run"
    whole = train(load_recipe(path), tmp_path / "whole")
    seen: set[Path] = set()
    for delay in (0.0, 0.003, 0.01):
        process = start_command("train", path, "--output", run, *(["--resume"] if run.exists() else []))
        while not (new := set(run.glob("checkpoint-*")) - seen):
            assert process.is_alive()
        time.sleep(delay)
        process.kill()
        process.join()
        seen |= new
    resumed = train(load_recipe(path), run, resume=True)
    for name, value in whole.model.adapter_state_dict().items():
        assert torch.equal(resumed.model.adapter_state_dict()[name], value), name


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"weight_decay": 0.1, "head_learning_rate": 0.05},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"max_steps": None, "num_train_epochs": 1.0},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_the_options_of_the_trainer_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write_recipe(tmp_path, training={"max_steps": 6, "eval_steps": 3, **settings})
    run = train(load_recipe(path), tmp_path / "run")
    assert 0 <= run.metrics["mean"]["test"] <= 1


def test_parts_learn_at_their_own_rates(tmp_path: Path) -> None:
    from hyperadapters.backbones.loading import load_backbone
    from hyperadapters.training.run import rows_by_task, training_arguments
    from hyperadapters.training.trainer import Trainer

    path = write_recipe(
        tmp_path, training={"head_learning_rate": 0.5, "retriever_learning_rate": 0.25, "weight_decay": 0.1}
    )
    recipe = load_recipe(path)
    tasks = load_tasks(recipe.tasks, recipe.data, 0)
    model = HyperAdapterModel(
        load_backbone(recipe.backbone), [data.task for data in tasks], recipe.model, recipe.backbone
    )
    trainer = Trainer(model, rows_by_task(tasks, "train"), args=training_arguments(recipe, tmp_path / "trainer"))
    optimizer = trainer.create_optimizer()
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rate) == sum(p.requires_grad for p in model.parameters())
    assert model.heads is not None
    assert rate[id(model.heads.weight)] == (0.5, 0.1)
    assert rate[id(model.heads.bias)] == (0.5, 0.0)
    assert rate[id(model.method.retriever.down.weight)] == (0.25, 0.1)
    assert rate[id(model.method.hypernetwork.common["up_weight"])] == (0.001, 0.1)
    assert rate[id(model.method.hypernetwork.up_weight.weight)] == (5e-5, 0.1)


def test_a_run_without_validation_rows_keeps_the_last_state(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training={"max_steps": 6})
    values = yaml.safe_load(path.read_text())
    for task in values["tasks"]:
        task["source"]["path"] = {split: f"{task['name']}-{split}.jsonl" for split in ("train", "test")}
    path.write_text(yaml.safe_dump(values))
    run = train(load_recipe(path), tmp_path / "run")
    assert run.metrics["mean"].keys() == {"test"}


def test_nothing_is_written_when_backbone_or_data_are_wrong(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    recipe = load_recipe(path, [f"backbone={tmp_path}/nowhere"])
    with pytest.raises(HyperAdaptersError, match="nowhere"):
        train(recipe, tmp_path / "run")
    (tmp_path / "colour-test.jsonl").write_text('{"text": "red", "label": "rde"}\n')
    with pytest.raises(HyperAdaptersError, match=r"test\.jsonl, line 1: unknown label 'rde'.*Did you mean 'red'"):
        train(load_recipe(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_one_task_trains(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, training={"max_steps": 4, "eval_steps": 2})
    values = yaml.safe_load(path.read_text())
    values["tasks"] = values["tasks"][:1]
    path.write_text(yaml.safe_dump(values))
    run = train(load_recipe(path), tmp_path / "run")
    assert run.metrics["routing_accuracy"] == 1.0
    state = run.model.adapter_state_dict()
    assert state.pop("method.thresholds").tolist() == [-torch.inf]  # a single task declines nothing
    assert all(value.isfinite().all() for value in state.values())


def test_a_recipe_written_beside_a_run_reads_back_as_the_same_recipe(trained: Path) -> None:
    original = load_recipe(trained / "recipe.yaml")
    assert load_recipe(trained / "run" / "resolved_recipe.yaml") == original
    assert parse(Recipe, original.model_dump(mode="json", by_alias=True)) == original
