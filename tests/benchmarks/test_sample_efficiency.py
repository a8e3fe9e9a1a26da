"""The sample-efficiency benchmark on a tiny backbone: learning rates, resuming, equal budgets, what each arm trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficiency import arms, finetuning_baselines, text_heads
from efficiency import data as suites
from efficiency.baseline_networks import Encoder, Network, WholeEncoder, trainable_numbers
from efficiency.code_digest import code_digest, digest_of, statements
from efficiency.data import alone, load, load_for_development, rows_of
from efficiency.experiment import Cell, Outcome, Setting, Trained
from efficiency.learning_rates import TRIALS, next_rate, search
from efficiency.library_methods import OwnLearner
from efficiency.runner import Runner
from efficiency.training_loop import Budget, fit, task_scores
from helpers import save_backbone

from hyperadapters import HyperAdapterModel, Task
from hyperadapters.config import DataConfig, Lengths
from hyperadapters.core import masked_mean
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.data.loading import subset
from hyperadapters.training.probes import linear_probe

FIELDS = {
    "suite",
    "arm",
    "n",
    "seed",
    "scores",
    "score",
    "trainable",
    "trainable_per_task",
    "bytes_per_task",
    "seconds",
    "peak_mb",
    "routing_accuracy",
    "learning_rate",
    "trials",
    "steps",
    "device",
    "threads",
    "version",
    "digest",
}
TASKS = (
    Task.classification("mood", ["bad", "good"]),
    Task.classification("pairs", ["no", "yes", "so"], fields=["text", "text_pair"]),
    Task.regression("number"),
)
PEFT_ARMS = ("lora_task", "lora_shared", "ia3_task", "ln_task", "prompt_task", "mpt")


def _example(task_id: int, split: str, row: int) -> Example:
    words = f"w{row % 40} w{len(split)} " + "w7 " * (row % 5)
    if task_id == 0:
        return Example(0, words + ("bad", "good")[row % 2], None, row % 2)
    if task_id == 1:
        return Example(1, words, ("no", "yes", "red")[row % 3], row % 3)
    return Example(2, f"{words} w{row}", None, row / 2)


def _tasks(n: int, seed: int) -> tuple[TaskData, ...]:
    found = []
    for task_id, task in enumerate(TASKS):
        rows = {
            split: [_example(task_id, split, row) for row in range(30)] for split in ("train", "validation", "test")
        }
        rows["train"] = subset(rows["train"], task, DataConfig(n_train=n), seed)
        found.append(TaskData(task, rows))
    return tuple(found)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(
        data=tmp_path,
        backbone_name=str(save_backbone(tmp_path / "bert")),
        first_layer=2,
        budgets={8: Budget(steps=8, batch_size=8, task_batch_size=4, evaluations=2, patience=2)},
        max_length=32,
        load=lambda folder, suite, n, seed: _tasks(int(n), seed),
    )


def _cell() -> Cell:
    return Cell(8, 0, _tasks(8, 0))


# Learning rates


def _search(measure: Callable[[float], float]) -> tuple[float, list[float]]:
    tried: list[float] = []

    def measured(rate: float) -> float:
        tried.append(rate)
        return measure(rate)

    return search(3e-4, measured), tried


@pytest.mark.parametrize(
    ("aim", "more"),
    [
        (3.3e-4, [5.5e-4, 1.7e-4]),  # between, towards the better neighbour first
        (2.9e-4, [1.7e-4, 5.5e-4]),
        (2e-4, [1.7e-4, 2.3e-4]),
        (3e-3, [3e-3, 1e-2]),  # beyond the edges
        (1e-5, [3e-5, 1e-5]),
        (1e-3, [3e-3, 1.7e-3]),  # both
    ],
)
def test_search_goes_beyond_the_best_at_an_edge_and_beside_one_within(aim: float, more: list[float]) -> None:
    best, tried = _search(lambda rate: -abs(np.log(rate / aim)))
    assert tried == [1e-4, 3e-4, 1e-3, *more]
    assert abs(np.log(best / aim)) == min(abs(np.log(rate / aim)) for rate in tried)


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_search_makes_as_many_trials_for_every_arm(sign: int) -> None:
    _, tried = _search(lambda rate: sign * rate)
    assert len(tried) == len(set(tried)) == TRIALS


def test_next_rate_goes_by_steps_of_about_three() -> None:
    assert [next_rate(rate, True) for rate in (1e-5, 3e-5, 1e-4, 0.3)] == [3e-5, 1e-4, 3e-4, 1.0]
    assert [next_rate(rate, False) for rate in (1.0, 3e-4, 1e-4, 3e-5)] == [0.3, 1e-4, 3e-5, 1e-5]


# Rows and resuming


def _fake(calls: list[tuple[int, float | None]], fails: bool = False) -> Any:
    def train(setting: Setting, cell: Cell, rate: float | None) -> Trained:
        calls.append((cell.seed, rate))
        if fails and cell.seed == 1:
            raise RuntimeError("out of luck")
        value = 0.0 if rate is None else -abs(rate - 1e-3)
        return Trained(value, lambda: Outcome({"mood": 50.0, "pairs": 70.0}), 10, 2.5, 10, 4, 0.1)

    return train


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _runner(setting: Setting, tmp_path: Path, **options: bool) -> Runner:
    return Runner(setting, tmp_path / "rows.jsonl", tmp_path / "rates.jsonl", lambda line: None, **options)


def test_cells_have_the_fields_of_the_protocol_and_are_not_run_twice(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, float | None]] = []
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls), 1e-3))
    _runner(setting, tmp_path).run(["fake"], [8], [0, 1])
    # Five trials with seed 0, the best of which is not trained again for its cell.
    assert calls == [*((0, rate) for rate in (3e-4, 1e-3, 3e-3, 5.5e-4, 1.7e-3)), (1, 1e-3)]
    rows = _rows(tmp_path / "rows.jsonl")
    assert [set(row) for row in rows] == [FIELDS, FIELDS]
    assert (rows[0]["suite"], rows[0]["trials"], rows[0]["digest"]) == ("main", TRIALS, code_digest())
    assert rows[0]["score"] == 60.0
    assert rows[0]["bytes_per_task"] == 10
    assert [set(row) for row in _rows(tmp_path / "rates.jsonl")] == [
        {"suite", "arm", "n", "learning_rate", "validation", "steps", "seconds", "device", "version", "digest"}
    ] * TRIALS
    calls.clear()
    _runner(setting, tmp_path).run(["fake"], [8], [0, 1, 2])
    assert calls == [(2, 1e-3)]


def test_cells_without_a_search_are_cells_of_their_own(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, float | None]] = []
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls), 3e-3))
    monkeypatch.setitem(arms.ARMS, "without", arms.Arm(_fake([])))
    _runner(setting, tmp_path).run(["fake", "without"], [8], [0])
    calls.clear()
    for _ in range(2):
        _runner(setting, tmp_path, searches=False).run(["fake", "without"], [8], [0])
    assert calls == [(0, 3e-3)]
    found = [(row["arm"], row["trials"], row["learning_rate"]) for row in _rows(tmp_path / "rows.jsonl")]
    assert found == [("fake", TRIALS, 1e-3), ("without", 0, None), ("fake", 0, 3e-3)]
    assert len(_rows(tmp_path / "rates.jsonl")) == TRIALS


def test_cells_of_another_suite_are_not_done(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float | None]] = []
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls), 1e-3))
    for suite in ("main", "fdu"):
        _runner(replace(setting, suite=suite), tmp_path).run(["fake"], [8], [0])
    assert len(calls) == 2 * TRIALS
    assert [row["suite"] for row in _rows(tmp_path / "rows.jsonl")] == ["main", "fdu"]


def test_again_runs_what_is_done(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float | None]] = []
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls), 1e-3))
    for again in (False, True):
        _runner(setting, tmp_path, again=again).run(["fake"], [8], [0])
    assert len(calls) == 2 * TRIALS
    assert len(_rows(tmp_path / "rows.jsonl")) == 2


def test_trials_of_an_earlier_run_are_used_and_the_best_trained_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, float | None]] = []
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls), 1e-3))
    _runner(setting, tmp_path).run(["fake"], [8], [1])
    (tmp_path / "rows.jsonl").unlink()
    calls.clear()
    _runner(setting, tmp_path).run(["fake"], [8], [0])
    assert calls == [(0, 1e-3)]


def test_a_failed_cell_has_a_row_and_is_tried_again(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, float | None]] = []
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls, fails=True)))
    _runner(setting, tmp_path).run(["fake"], [8], [0, 1, 2])
    rows = _rows(tmp_path / "rows.jsonl")
    assert [row.get("error") for row in rows] == [None, "RuntimeError: out of luck", None]
    assert [seed for seed, _ in calls] == [0, 1, 2]
    calls.clear()
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls)))
    _runner(setting, tmp_path).run(["fake"], [8], [0, 1, 2])
    assert calls == [(1, None)]
    assert "score" in _rows(tmp_path / "rows.jsonl")[-1]


def test_what_a_failed_search_has_trained_is_no_other_arms(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_the_second(setting: Setting, cell: Cell, rate: float) -> Trained:
        if rate > 3e-4:
            raise LookupError("out of luck")
        return Trained(99.0, lambda: Outcome({"mood": 1.0}), 1, 1.0, 4, 1, 0.1)

    calls: list[tuple[int, float | None]] = []
    monkeypatch.setitem(arms.ARMS, "failing", arms.Arm(fail_at_the_second, 1e-3))
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake(calls), 1e-3))
    _runner(setting, tmp_path).run(["failing", "fake"], [8], [0])
    rows = _rows(tmp_path / "rows.jsonl")
    assert rows[0]["error"] == "LookupError: out of luck"
    assert (rows[1]["arm"], rows[1]["score"]) == ("fake", 60.0)


def test_a_rate_at_which_training_breaks_is_no_choice(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_when_high(setting: Setting, cell: Cell, rate: float) -> Trained:
        if rate > 1e-3:
            raise RuntimeError("not finite")
        return Trained(1e4 * rate, lambda: Outcome({"mood": 1e4 * rate}), 1, 1.0, 4, 1, 0.1)

    monkeypatch.setitem(arms.ARMS, "breaking", arms.Arm(break_when_high, 1e-3))
    _runner(setting, tmp_path).run(["breaking"], [8], [0, 1])
    assert [(row["learning_rate"], row["score"]) for row in _rows(tmp_path / "rows.jsonl")] == [(1e-3, 10.0)] * 2


def test_the_control_with_all_layers_is_an_arm_of_its_own(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(arms.ARMS, "fake", arms.Arm(_fake([]), 1e-3))
    _runner(replace(setting, first_layer=0), tmp_path).run(["fake"], [8], [0])
    assert _rows(tmp_path / "rows.jsonl")[0]["arm"] == "fake_all_layers"
    assert {row["arm"] for row in _rows(tmp_path / "rates.jsonl")} == {"fake_all_layers"}


# Data and budgets


def _write(folder: Path, labels: int, rows: dict[str, int]) -> None:
    """Files of a task: the first label in half of the rows, the others in equal shares of the rest."""
    folder.mkdir(parents=True)
    for split, count in rows.items():
        found = [
            {"text": f"{folder.name} {split} {row}", "label": str(0 if row % 2 else row // 2 % labels)}
            for row in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task `many` of `main`, and two tasks of each family."""
    recipe = {
        "backbone": "none",
        "training": {"max_steps": 1},
        "tasks": [{"name": "many", "source": {"path": "elsewhere/{split}.jsonl"}}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr(suites, "RECIPE", tmp_path / "recipe.yaml")
    _write(tmp_path / "many", 25, dict.fromkeys(("train", "validation", "test"), 400))
    tasks = []
    for suite in suites.FAMILIES:
        for name in ("music", f"own_{suite}"):
            _write(tmp_path / "families" / suite / name, 3, {"train": 50, "validation": 20, "test": 30})
            metric = "macro_f1" if suite == "tweeteval" else "accuracy"
            tasks.append({"suite": suite, "name": name, "labels": ["0", "1", "2"], "metric": [metric]})
    (tmp_path / "families" / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    return tmp_path


def test_subsets_are_nested_stratified_and_keep_two_rows_a_label(folder: Path) -> None:
    drawn = {n: load(folder, "main", n, 0)[0].splits for n in (16, 32, 100, "all")}
    sizes = {n: [len(splits[split]) for split in ("train", "validation", "test")] for n, splits in drawn.items()}
    assert sizes == {16: [50, 16, 400], 32: [50, 32, 400], 100: [100, 100, 400], "all": [400, 400, 400]}
    for split in ("train", "validation"):
        texts = [{example.text for example in drawn[n][split]} for n in (32, 100, "all")]
        assert texts[0] < texts[1] < texts[2]
    assert min(np.bincount([int(example.target) for example in drawn[32]["train"]])) == 2
    assert load(folder, "main", 32, 1)[0].splits["train"] != drawn[32]["train"]


def test_families_are_described_by_their_file(folder: Path) -> None:
    found = load(folder, "tweeteval", 16, 0)
    assert [(task.task.name, task.task.main_metric) for task in found] == [
        ("music", "macro_f1"),
        ("own_tweeteval", "macro_f1"),
    ]
    assert found[1].splits["train"][0].text.startswith("own_tweeteval train")


def test_all_has_the_rows_of_every_suite_under_names_of_their_own(folder: Path) -> None:
    every = load(folder, "all", 16, 0)
    assert [task.task.name for task in every] == [
        "many",
        *(f"{suite}_{name}" for suite in suites.FAMILIES for name in ("music", f"own_{suite}")),
    ]
    apart = [task for suite in suites.PARTS for task in load(folder, suite, 16, 0)]
    for task_id, (ours, theirs) in enumerate(zip(every, apart, strict=True)):
        for split, examples in ours.splits.items():
            assert [example.text for example in examples] == [example.text for example in theirs.splits[split]]
            assert {example.task_id for example in examples} == {task_id}


def test_development_scores_rows_that_are_not_drawn(folder: Path) -> None:
    (first, _), (second, _) = load(folder, "fdu", 16, 0), load_for_development(folder, "fdu", 16, 0)
    assert first.splits["train"] == second.splits["train"]
    assert first.splits["validation"] == second.splits["validation"]
    for split in ("train", "validation"):
        drawn = {example.text for example in first.splits[split]}
        scored = {example.text for example in second.splits["test"] if f" {split} " in example.text}
        assert not drawn & scored
        rows = load(folder, "fdu", "all", 0)[0].splits[split]
        assert len(drawn) + len(scored) == len(rows)
    with pytest.raises(ValueError, match=r"task 'music': expected rows besides the \d+ that are drawn"):
        load_for_development(folder, "fdu", "all", 0)


def test_steps_grow_with_the_root_of_the_number_of_tasks() -> None:
    assert [Budget(steps=250).for_tasks(count).steps for count in (3, 12, 48)] == [125, 250, 500]


def test_shares_of_tasks_trained_alone_add_up() -> None:
    sizes = [32] * 11 + [154]
    budget = Budget(steps=400)
    steps = budget.steps_alone(sizes)
    assert sum(steps) * budget.task_batch_size == budget.steps * budget.batch_size
    exact = [sum(steps) * size / sum(sizes) for size in sizes]
    assert np.abs(np.subtract(steps, exact)).max() < 1


# Arms


def _network(name: str, setting: Setting) -> Network:
    arm: Any = arms.ARMS[name].train
    tasks = (alone(_cell().tasks[1]),) if arm.func is finetuning_baselines.train_alone else _cell().tasks
    torch.manual_seed(0)
    encoder: Encoder = arm.args[0](setting, len(tasks))
    return Network(encoder, tasks, setting.hidden_size)


def _bare(setting: Setting, examples: list[Example]) -> torch.Tensor:
    inputs = setting.texts.batch(examples)
    return masked_mean(setting.backbone(**inputs).last_hidden_state, inputs["attention_mask"])


@pytest.mark.parametrize("first_layer", [0, 2])
@pytest.mark.parametrize("name", ["lora_task", "lora_shared", "ia3_task", "ln_task", "full"])
def test_arms_equal_the_bare_backbone_at_the_start(setting: Setting, name: str, first_layer: int) -> None:
    pytest.importorskip("peft", reason="peft is in the extra 'bench' only")
    setting = replace(setting, first_layer=first_layer)
    network = _network(name, setting).eval()
    examples = rows_of(_cell().tasks, "test")[20:50]
    with torch.no_grad():
        assert torch.allclose(network.encoder(examples), _bare(setting, examples), atol=1e-5)


def test_prompts_are_read_as_peft_reads_them(setting: Setting) -> None:
    pytest.importorskip("peft", reason="peft is in the extra 'bench' only")
    network = _network("prompt_task", setting).eval()
    examples = _cell().tasks[0].splits["test"]
    inputs = setting.texts.batch(examples)
    with torch.no_grad():
        hidden = network.encoder.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
        expected = masked_mean(hidden[:, finetuning_baselines.PROMPT_TOKENS :], inputs["attention_mask"])
        assert torch.allclose(network.encoder(examples), expected, atol=1e-5)


@pytest.mark.parametrize("name", PEFT_ARMS)
def test_an_arm_trains_only_what_it_declares(setting: Setting, name: str) -> None:
    pytest.importorskip("peft", reason="peft is in the extra 'bench' only")
    before = {key: value.clone() for key, value in setting.backbone.state_dict().items()}
    network = _network(name, setting)
    width, layers = 16, 2
    declared = {
        "lora_task": layers * 2 * 2 * 8 * width,
        "lora_shared": layers * 2 * 2 * 8 * width,
        "ia3_task": layers * (width + width + width + 2 * width),
        "ln_task": layers * 2 * 2 * width,
        "prompt_task": 20 * width,
        "mpt": 20 * width + 3 * (20 + width),
    }[name]
    assert trainable_numbers(network.encoder) == declared
    assert network.encoder.per_task == (20 + width if name == "mpt" else 0)
    trained = arms.ARMS[name].train(setting, _cell(), 1e-2)
    heads = [2 * (width + 1), 3 * (width + 1), width + 1]
    alone_each = 3 if name.endswith("_task") else 1
    assert trained.trainable == alone_each * declared + sum(heads)
    own = {"lora_shared": 0, "mpt": 20 + width}.get(name, declared)
    assert trained.trainable_per_task == pytest.approx(own + sum(heads) / 3)
    assert trained.seconds > 0
    tested = trained.test()
    assert set(tested.scores) == {"mood", "pairs", "number"}
    assert tested.routing_accuracy is None
    assert all(torch.equal(before[key], value) for key, value in setting.backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in setting.backbone.parameters())


# Heads that read texts

TEXT_ARMS = [name for name in arms.ARMS if name.endswith("_texts") and "_no_" not in name]


@pytest.mark.parametrize("name", [name for name in TEXT_ARMS if name != "lora32_shared_texts"])
def test_arms_get_heads_that_read_texts(setting: Setting, name: str) -> None:
    trained = arms.ARMS[name].train(setting, _cell(), 1e-3)
    assert set(trained.test().scores) == {"mood", "pairs", "number"}
    assert trained.model is not None
    assert trained.model.adapter_config.head_inputs != "adapted"
    assert trained.model.adapter_config.label_names


def test_the_rivals_of_plus_have_its_heads() -> None:
    for name in TEXT_ARMS:
        settings: dict[str, Any] = arms.ARMS[name].train.args[0]  # type: ignore[attr-defined]
        expected = text_heads.FROZEN_SETTINGS if "frozen" in name else text_heads.SETTINGS
        assert expected.items() <= settings.items(), name


def test_lora_at_another_rank(setting: Setting, tmp_path: Path) -> None:
    wide = replace(setting, backbone_name=str(save_backbone(tmp_path / "wide", hidden_size=32)))
    first, second = (
        arms.ARMS[name].train(wide, _cell(), 1e-3) for name in ("lora_shared_texts", "lora32_shared_texts")
    )
    heads = 3 * first.trainable_per_task
    assert second.trainable - heads == 4 * (first.trainable - heads)


@pytest.mark.parametrize("joint_states_are_known", [False, True])
def test_cached_states_of_separate_texts_change_no_output(setting: Setting, joint_states_are_known: bool) -> None:
    learner = OwnLearner({"method": "task_adapter", **text_heads.SETTINGS}, setting, _cell()).eval()
    for parameter in learner.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    examples = rows_of(_cell().tasks, "test")[25:65]
    if joint_states_are_known:
        setting.states.prepare(examples)
    task_ids = torch.tensor([example.task_id for example in examples])
    with torch.no_grad():
        expected = learner.model(**learner.model.collator.inputs(examples), task_ids=task_ids).logits
        for _ in range(2):
            torch.testing.assert_close(learner.logits(examples), expected, atol=1e-5, rtol=1e-4)


def test_adapters_a_task_start_from_the_shared_one(setting: Setting) -> None:
    cell, examples = _cell(), rows_of(_cell().tasks, "test")
    shared, each = (
        OwnLearner({"method": method, **text_heads.SETTINGS}, setting, cell).eval()
        for method in ("shared_adapter", "task_adapter")
    )
    for parameter in shared.model.method.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        each.start_from(shared)
        torch.testing.assert_close(each.logits(examples), shared.logits(examples))
        for parameter in each.model.method.learned_adapters.parameters():
            parameter[:, 1] += 1
        changed = ~each.logits(examples).isclose(shared.logits(examples), atol=1e-3)
    assert {examples[row].task_id for row in changed.any(dim=1).nonzero()[:, 0].tolist()} == {1}


# Training


def test_training_learns_and_keeps_the_best_state(setting: Setting) -> None:
    pytest.importorskip("peft", reason="peft is in the extra 'bench' only")
    network = _network("lora_shared", setting)
    rows = rows_of(_cell().tasks, "train")
    budget = Budget(steps=80, evaluations=8, patience=8)

    def scores() -> dict[str, float]:
        return task_scores(network.tasks, rows, network.answers(rows))

    before = scores()
    # Far too high a rate: the last state is not the best one.
    found = fit(network, rows, rows, setting.texts.lengths(rows), budget, 80, 16, 0.3, seed=0)
    assert found.steps == 80
    assert found.scores == pytest.approx(scores(), abs=1e-3)
    assert sum(found.scores.values()) > sum(before.values()) + 30


def test_training_stops_when_nothing_gets_better(setting: Setting) -> None:
    class Stubborn(Network):
        def answers(self, examples: Any) -> list[int | float]:
            return [0] * len(examples)

    network = Stubborn(WholeEncoder(setting), _cell().tasks, setting.hidden_size)
    rows = rows_of(_cell().tasks, "train")
    start = [parameter.clone() for parameter in network.parameters()]
    found = fit(
        network, rows, rows, setting.texts.lengths(rows), Budget(40, evaluations=8, patience=2), 40, 8, 1e-3, seed=0
    )
    assert found.steps == 15  # the first of eight evaluations is the best, two more are made
    assert not torch.equal(start[0], next(network.parameters()))


def test_cached_states_repeat_the_backbone(setting: Setting) -> None:
    examples = rows_of(_cell().tasks, "test")[25:45]
    inputs = setting.texts.batch(examples)
    hidden, mask = setting.states.batch(examples)
    with torch.no_grad():
        whole = setting.backbone(**inputs, output_hidden_states=True).hidden_states[2]
    assert torch.equal(mask, inputs["attention_mask"])
    assert torch.allclose(hidden, whole * mask[..., None], atol=1e-5)


def test_the_probe_is_the_librarys_and_computes_features_once(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = _cell()
    trained = arms.ARMS["probe"].train(setting, cell, None)
    found = trained.test().scores
    described = [data.task for data in cell.tasks]
    model = HyperAdapterModel(
        setting.backbone,
        described,
        backbone_name=setting.backbone_name,
        lengths=Lengths(input=setting.max_length),
    )
    for data in cell.tasks:
        assert found[data.task.name] == pytest.approx(100 * linear_probe(model, data)[data.task.main_metric], abs=1e-3)

    def fail(*_: Any) -> None:
        raise AssertionError("features are computed again")

    monkeypatch.setattr("efficiency.linear_probe.frozen_features", fail)
    assert arms.ARMS["probe"].train(setting, cell, None).test().scores == found


def test_the_arms_of_the_published_method_do_not_get_the_default_preset() -> None:
    for name, arm in arms.ARMS.items():
        if name.startswith("pha"):
            assert arm.train.args[0]["preset"] == "paper", name  # type: ignore[attr-defined]


# Digest


def test_the_digest_depends_on_statements_only(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text('def f():\n    """Say."""\n    return 1  # why\n')
    before = digest_of([tmp_path / "one.py"])
    (tmp_path / "one.py").write_text("def f():\n    return  1\n")
    assert digest_of([tmp_path / "one.py"]) == before
    (tmp_path / "one.py").write_text("def f():\n    return 2\n")
    assert digest_of([tmp_path / "one.py"]) != before
    assert statements('class A:\n    "Only a docstring."\n') == "class A:\n    pass"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "shared_adapter"},
        {"method": "task_adapter", "form": "lora"},
        {"preset": "plus", "head_inputs": "adapted_texts"},
    ],
    ids=str,
)
def test_tasks_that_harmful_adapters_do_not_help_are_answered_without_them(
    settings: dict[str, Any], setting: Setting
) -> None:
    torch.manual_seed(0)
    cell = _cell()
    train, rows = rows_of(cell.tasks, "train"), rows_of(cell.tasks, "validation")
    chosen, alone = (OwnLearner({**text_heads.SETTINGS, **settings}, setting, cell).eval() for _ in range(2))
    for parameter in chosen.model.method.parameters():
        parameter.data.normal_(std=10.0)
    for parameter in alone.model.method.parameters():
        parameter.data.zero_()
    before = [parameter.clone() for parameter in chosen.model.method.parameters()]
    chosen.choose_heads(train, rows)
    alone.fit_heads(train, "frozen")
    assert all(map(torch.equal, before, chosen.model.method.parameters()))
    frozen = [row for row in rows if chosen._factors[row.task_id] == 0]
    assert frozen
    assert torch.equal(chosen.logits(frozen), alone.logits(frozen))
    mixed = [*frozen[:3], *(row for row in rows if row not in frozen), *frozen[3:]]
    assert torch.allclose(chosen.logits(mixed)[:3, :2], alone.logits(mixed)[:3, :2], rtol=1e-4, atol=1e-4)
    chosen.fit_heads(train)
    assert set(chosen._factors) == {1.0}
    assert not torch.allclose(chosen.logits(frozen), alone.logits(frozen))
