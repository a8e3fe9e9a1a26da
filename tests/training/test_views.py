"""What a training shows while it runs: in terminals of all sizes, in files, and as JSON."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import tiny_backbone, tiny_tokenizer
from rich.cells import cell_len
from rich.console import Console
from tolerance import rounding
from transformers import TrainerCallback, TrainerControl, TrainerState

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.config import ModelConfig
from hyperadapters.core import Losses, TaskLoss
from hyperadapters.training.loss_means import LossMeans
from hyperadapters.training.views import JsonView, LineView, LiveView, TrainingView, View, make_view

NAMES = ["mood", "[bold red]alarm[bold]", "größe\u2028😀, a name that is longer than the others"]
SHOWN = [*NAMES[:2], "größe\\u2028😀"]
"""Names as they are shown. The table may shorten the last one."""
STEPS = 6
FRAME = re.compile(r"(?:\r?\x1b\[2K(?:\x1b\[1A)?)+")
"""What a live table writes before it writes itself anew."""
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class RecordingTrainer(Trainer):
    """Keeps the tasks of the rows of each step."""

    task_ids: list[list[int]]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.task_ids.append(inputs["task_ids"].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


def make_trainer(**settings: Any) -> RecordingTrainer:
    tasks = [Task.classification(name, ["bad", "good"]) for name in NAMES]
    model = HyperAdapterModel(tiny_backbone("bert"), tasks, ModelConfig(adapter_dim=2, prototype_dim=4, hidden_dim=4))
    model.tokenizer = tiny_tokenizer()
    words = ["bad", "good"]
    data = {name: [{"text": f"w{row} {words[row % 2]}", "label": words[row % 2]} for row in range(6)] for name in NAMES}
    arguments = {"max_steps": STEPS, "eval_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 8}
    trainer = RecordingTrainer(model, data, data, TrainingArguments(**{**arguments, **settings}))
    trainer.task_ids = []
    return trainer


@pytest.fixture(scope="module")
def trained() -> tuple[RecordingTrainer, list[dict[str, Any]]]:
    """A finished training, and the JSON objects that it has written."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        trainer = make_trainer(progress="json")
        trainer.train()
    return trainer, [json.loads(line) for line in output.getvalue().splitlines()]


@pytest.fixture(scope="module")
def log(trained: tuple[RecordingTrainer, Any]) -> list[dict[str, Any]]:
    """The log of the training: the names that all loggers get."""
    return trained[0].state.log_history


def replay(view: TrainingView, log: Sequence[dict[str, Any]], eval_strategy: str = "steps") -> None:
    """Call a view as the training did that has this log."""
    args, state = TrainingArguments(eval_strategy=eval_strategy), TrainerState(max_steps=STEPS)
    control = TrainerControl()
    best = -math.inf
    with view.showing():
        view.on_train_begin(args, state, control)
        for entry in log:
            state.global_step = entry["step"]
            if "eval_mean" in entry:
                view.evaluated(entry, is_best=entry["eval_mean"] > best)
                best = max(best, entry["eval_mean"])
            else:
                view.on_step_end(args, state, control)
                view.on_log(args, state, control, logs=entry)
        view.on_train_end(args, state, control)


def last_frame(log: Sequence[dict[str, Any]], tasks: Sequence[Task], width: int = 100, height: int = 40) -> list[str]:
    """The lines that a live table leaves in a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={})
    replay(LiveView(tasks, console), log)
    return CODES.sub("", FRAME.split(console.file.getvalue())[-1]).splitlines()  # type: ignore[attr-defined]


# The losses of the tasks


def test_losses_are_averaged_over_the_steps_that_are_kept() -> None:
    means = LossMeans(num_tasks=3)
    assert means.read() is None

    def add(total: float, sums: list[float], counts: list[int], tasks: list[int]) -> None:
        losses = Losses(*(torch.tensor(value) for value in (total, total - 1, 0.75, 0.25)))
        rows = TaskLoss(torch.tensor(total - 1), torch.tensor(sums), torch.tensor(counts))
        means.add(losses, rows, torch.tensor(tasks))

    add(3.0, [1.0, 2.0, 6.0], [1, 2, 3], [0, 2, 2])
    add(5.0, [4.0], [2], [0])
    assert means.micro_batches == 2
    means.keep_step()
    add(math.nan, [math.nan], [1], [1])
    means.discard_step()
    found = means.read()
    assert found is not None
    assert found.objective == pytest.approx({"total": 4.0, "task": 3.0, "instance": 0.75, "prototype": 0.25})
    assert found.tasks == pytest.approx({0: 5 / 3, 2: 8 / 5})
    assert means.read() is None


def test_the_losses_of_the_tasks_make_up_the_task_loss(
    trained: tuple[RecordingTrainer, Any], log: list[dict[str, Any]]
) -> None:
    losses = [entry for entry in log if "loss" in entry]
    for task_ids, entry in zip(trained[0].task_ids, losses, strict=True):
        of_tasks = [entry[f"task_loss_{NAMES[task]}"] for task in task_ids]
        assert sum(of_tasks) / len(of_tasks) == pytest.approx(entry["loss_task"], rel=rounding(16))
        assert {name for name in entry if name.startswith("task_loss_")} == {f"task_loss_{NAMES[t]}" for t in task_ids}


# JSON


def test_the_json_log_has_the_values_of_the_log(
    trained: tuple[RecordingTrainer, list[dict[str, Any]]], log: list[dict[str, Any]]
) -> None:
    begin, *between, end = trained[1]
    assert begin == {"event": "begin", "step": 0, "max_steps": STEPS}
    assert (end["event"], end["step"]) == ("end", STEPS)
    means = {entry["step"]: entry["eval_mean"] for entry in log if "eval_mean" in entry}
    assert means[end["best_step"]] == max(means.values())
    assert [found["event"] for found in between] == ["losses", "losses", "evaluation"] * 3
    for found, entry in zip(between, [entry for entry in log if "train_loss" not in entry], strict=True):
        assert found["step"] == entry["step"]
        if found["event"] == "losses":
            assert {name: found[name] for name in ("loss", "loss_task", "learning_rate")}.items() <= entry.items()
            for name, values in found["tasks"].items():
                assert values == {"loss": entry[f"task_loss_{name}"]}
        else:
            assert (found["mean"], found["routing_accuracy"]) == (entry["eval_mean"], entry["eval_routing_accuracy"])
            assert found["tasks"] == {name: {"accuracy": entry[f"eval_{name}_accuracy"]} for name in NAMES}
    best = [found["step"] for found in between if found.get("is_best")]
    assert best[-1] == end["best_step"]


def test_what_others_print_while_a_json_log_is_written_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = make_view("json", [])
    with view.showing():
        print("a logger")
        view.on_train_begin(TrainingArguments(), TrainerState(max_steps=STEPS), TrainerControl())
    print("after it")
    out, err = capsys.readouterr()
    assert [json.loads(line)["event"] for line in out.splitlines()[:-1]] == ["begin"]
    assert (out.splitlines()[-1], err) == ("after it", "a logger\n")


def test_numbers_that_json_lacks_are_null(log: list[dict[str, Any]]) -> None:
    output = io.StringIO()
    replay(
        JsonView([Task.regression("size")], output), [{"step": 2, "eval_mean": math.nan, "eval_size_pearson": math.nan}]
    )
    found = json.loads(output.getvalue().splitlines()[1])
    assert (found["mean"], found["tasks"]) == (None, {"size": {"pearson": None}})


# Lines


def test_there_is_one_line_for_each_evaluation(
    trained: tuple[RecordingTrainer, Any], log: list[dict[str, Any]]
) -> None:
    output = io.StringIO()
    replay(LineView(trained[0].model.tasks, output), log)
    *lines, rest = output.getvalue().split("\n")
    number = r"\d\.\d{4}"
    scores = ", ".join(f"{re.escape(name)}.* {number}" for name in SHOWN)
    for step, line in zip((2, 4, 6), lines, strict=True):
        pattern = rf"step {step}/6: loss {number}, mean {number}(?: \(best\))?, routing {number}, {scores}"
        assert re.fullmatch(pattern, line)
    assert rest == ""
    assert "(best)" in lines[0]


def test_without_evaluations_there_is_a_line_for_each_entry_of_the_log(log: list[dict[str, Any]]) -> None:
    output = io.StringIO()
    replay(LineView([], output), [entry for entry in log if "eval_mean" not in entry], eval_strategy="no")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    lines = [f"step {step}/6: loss {loss:.4f}" for step, loss in enumerate(losses, start=1)]
    assert output.getvalue().splitlines() == lines


def test_a_training_without_evaluations_that_ends_before_its_first_entry_of_the_log_has_a_line() -> None:
    output = io.StringIO()
    replay(LineView([], output), [{"step": STEPS, "train_loss": 0.5, "train_runtime": 2.0}], eval_strategy="no")
    assert output.getvalue() == "step 6/6: loss 0.5000\n"


# The live table


def cells(lines: Sequence[str], name: str) -> list[str]:
    """The cells of the row of a task."""
    (row,) = [line for line in lines if name in line]
    return [cell.strip() for cell in row.split("│")[2:-1]]


def test_the_table_shows_the_last_losses_and_scores_and_the_best_step(
    trained: tuple[RecordingTrainer, list[dict[str, Any]]], log: list[dict[str, Any]]
) -> None:
    progress, *table = last_frame(log, trained[0].model.tasks)
    losses = [entry for entry in log if "loss" in entry][-1]
    evaluations = {entry["step"]: entry for entry in log if "eval_mean" in entry}
    last, best = evaluations[STEPS], evaluations[trained[1][-1]["best_step"]]
    assert re.fullmatch(rf"Finishing .* 6/6 .* loss {losses['loss']:.4f} *", progress)
    (header,) = [line for line in table if "metric" in line]
    assert [title.strip() for title in header.split("┃")[1:-1]] == [
        *("task", "loss", "metric", "step 6", f"best: step {best['step']}")
    ]
    for name, shown in zip(NAMES, SHOWN, strict=True):
        loss = losses.get(f"task_loss_{name}")
        scores = [f"{entry[f'eval_{name}_accuracy']:.4f}" for entry in (last, best)]
        assert cells(table, shown) == ["" if loss is None else f"{loss:.4f}", "accuracy", *scores]
    assert cells(table, "mean") == ["", "", f"{last['eval_mean']:.4f}", f"{best['eval_mean']:.4f}"]


def test_a_narrow_table_shortens_names_and_no_scores(
    trained: tuple[RecordingTrainer, list[dict[str, Any]]], log: list[dict[str, Any]]
) -> None:
    _, *table = last_frame(log, trained[0].model.tasks, width=44)
    evaluations = {entry["step"]: entry for entry in log if "eval_mean" in entry}
    shown = [evaluations[STEPS], evaluations[trained[1][-1]["best_step"]]]
    (header,) = [line for line in table if "task" in line]
    assert [title.strip() for title in header.split("┃")[1:-1]] == ["task", "now", "best"]
    for name, part in zip(NAMES, ("mood", "[bold red]", "größe"), strict=True):
        assert cells(table, part) == [f"{entry[f'eval_{name}_accuracy']:.4f}" for entry in shown]
    assert cells(table, "mean") == [f"{entry['eval_mean']:.4f}" for entry in shown]


def test_before_the_first_evaluation_the_table_has_no_scores(
    trained: tuple[RecordingTrainer, Any], log: list[dict[str, Any]]
) -> None:
    _, *table = last_frame(log[:1], trained[0].model.tasks)
    assert [cells(table, shown)[1:] for shown in SHOWN] == [["accuracy", "", ""]] * 3
    assert not any("mean" in line for line in table)


@pytest.mark.parametrize("width", [1, 12, 25, 40, 80])
def test_no_line_is_wider_than_the_terminal(
    width: int, trained: tuple[RecordingTrainer, Any], log: list[dict[str, Any]]
) -> None:
    lines = last_frame(log, trained[0].model.tasks, width=width)
    assert max(map(cell_len, lines)) <= width
    if width >= 40:
        assert any("moo" in line for line in lines)


@pytest.mark.parametrize("height", [5, 15, 100])
def test_of_many_tasks_those_with_the_lowest_scores_are_shown(height: int) -> None:
    tasks = [Task.regression(f"task {number}") for number in range(3000)]
    scores = {f"eval_{task.name}_pearson": -number / 3000 for number, task in enumerate(tasks)}
    scores["eval_task 0_pearson"] = math.nan
    lines = last_frame([{"step": 2, "eval_mean": -0.5, **scores}], tasks, height=height)
    rows = {5: 1, 15: 5, 100: 20}[height]
    names = [match[1] for line in lines if (match := re.match("│ (task \\d+)", line))]
    assert names == ["task 0", *(f"task {3000 - row}" for row in range(1, rows))]
    assert any(f"and {3000 - rows} more" in line for line in lines)
    assert len(lines) < height or height == 5
    output = io.StringIO()
    replay(LineView(tasks, output), [{"step": 2, "eval_mean": -0.5, **scores}])
    assert output.getvalue().endswith(", task 7 -0.0023, and 2992 more tasks\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_logged_appears_above_the_table_and_an_error_leaves_the_terminal_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    handler, logger = logging.StreamHandler(), logging.getLogger("hyperadapters")
    logger.addHandler(handler)

    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == 2:
                logger.warning("a warning\x1b[2J of the library")
            if state.global_step == 3:
                raise KeyError("a failure")

    trainer = make_trainer()
    trainer.add_callback(Failing)
    try:
        with pytest.raises(KeyError, match="a failure"):
            trainer.train()
    finally:
        logger.removeHandler(handler)
    assert handler.stream is terminal
    assert sys.stderr is terminal
    output = terminal.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is visible
    *_, frame = FRAME.split(output)
    assert "3/6" in frame
    assert "warning" not in frame
    assert "a warning of the library\n" in CODES.sub("", output)


def test_without_a_terminal_there_are_lines_and_nothing_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(max_steps=2).train()
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"step 2/2: loss .*\n", err)


@pytest.mark.parametrize(("name", "kind"), [("lines", LineView), ("json", JsonView), ("none", TrainingView)])
def test_a_view_can_be_chosen_in_a_terminal(name: View, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert type(make_view("auto", [])) is LiveView
    assert type(make_view("auto", [], has_bars=False)) is LineView
    assert type(make_view(name, [])) is kind
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_view("auto", [])) is LineView
