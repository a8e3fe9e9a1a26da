"""Training from data in memory: what it reads, what a trained model is ready for, and what is written."""

from __future__ import annotations

import random
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import transformers
from helpers import (
    FROZEN_TEXTS,
    save_backbone,
    tiny_backbone,
    tiny_language_model_tokenizer,
    tiny_tokenizer,
)
from transformers import TrainerCallback

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.config import DataConfig, ModelConfig, Recipe, TrainingConfig, parse
from hyperadapters.data.examples import Example
from hyperadapters.errors import CheckpointError, DataError, HyperAdaptersError, RecipeError, TaskError
from hyperadapters.heads.unfitted import UnfittedHeadsWarning, unfitted_tasks
from hyperadapters.interop.task_files import write_task_files
from hyperadapters.training.run import train, training_arguments

TASKS = [
    Task.classification("colour", ["blue", "red"]),
    Task.classification("mood", ["bad", "good"], fields=("text", "text_pair")),
    Task.regression("size"),
]
SIZES: dict[str, Any] = {"adapter_dim": 4, "prototype_dim": 8, "hidden_dim": 8, "feature_layer": 1}
SHORT: dict[str, Any] = {
    "max_steps": 6,
    "eval_steps": 2,
    "per_device_train_batch_size": 12,
    "learning_rate": 1e-3,
    "logging_steps": 2,
}


def make_model(preset: str = "plus", kind: str = "bert", tasks: list[Task] = TASKS, **settings: Any) -> Any:
    torch.manual_seed(1)
    size = {"initializer_range": 0.3} if kind == "bert" else {}
    model = HyperAdapterModel(
        tiny_backbone(kind, **size), tasks, parse(ModelConfig, {"preset": preset, **SIZES, **settings})
    )
    model.tokenizer = tiny_language_model_tokenizer() if kind == "gpt2" else tiny_tokenizer()
    return model


def make_data(count: int = 12, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Rows of which a word decides the label, or how often it occurs the number."""
    generator = random.Random(seed)

    def text(*words: str) -> str:
        return " ".join([*words, f"w{generator.randrange(40)}", f"w{generator.randrange(40)}"])

    colours, moods = ["blue", "red"] * count, ["bad", "good"] * count
    return {
        "colour": [{"text": text(word, word), "label": word} for word in colours[:count]],
        "mood": [{"text": text(), "text_pair": text(word), "label": word} for word in moods[:count]],
        "size": [{"text": text(*["yes"] * (row % 4)), "label": 10.0 * (row % 4)} for row in range(count)],
    }


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A map-style dataset whose `__getitem__` does not end an iteration."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index % len(self.rows)]
        return {**row, "label": torch.tensor(row["label"])} if isinstance(row["label"], float) else row


def as_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    found = datasets.Dataset.from_list(rows)
    if isinstance(rows[0]["label"], str):
        names = sorted({row["label"] for row in rows}, reverse=True)  # another order than that of the task
        return found.cast_column("label", datasets.ClassLabel(names=names))
    return found


def as_examples(rows: list[dict[str, Any]], task: Task) -> list[Example]:
    targets = [task.labels.index(row["label"]) if task.labels else row["label"] for row in rows]
    return [Example(None, row["text"], row.get("text_pair"), target) for row, target in zip(rows, targets, strict=True)]


def row_of(example: Example, task: Task) -> dict[str, Any]:
    label = task.labels[int(example.target)] if task.labels else example.target  # type: ignore[arg-type]
    return {"text": example.text, "text_pair": example.text_pair, "label": label}


FORMS: dict[str, Any] = {
    "DataFrame": pd.DataFrame,
    "Dataset": as_dataset,
    "torch dataset": Rows,
    "tuple": tuple,
}


def trained(model: Any, train_data: Any, eval_data: Any = None, **options: Any) -> Trainer:
    trainer = Trainer(model, train_data, eval_data, TrainingArguments(**{**SHORT, **options}))
    trainer.train()
    return trainer


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.adapter_state_dict().items()}


def is_fitted(model: Any) -> bool:
    """Whether the heads are those of the last step of training, which are rounded to float16."""
    weights = torch.cat([model.heads.weight.flatten(), model.heads.wide_weight.flatten()])
    return torch.equal(weights.half().float(), weights)


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """The state that training on a list of dicts ends with."""
    model = make_model()
    trained(model, make_data(), make_data(6, seed=1))
    return state_of(model)


# Data


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_trains_to_the_same_weights(form: str, expected: dict[str, torch.Tensor]) -> None:
    make = FORMS[form]
    train_data, eval_data = (
        {name: make(rows) for name, rows in data.items()} for data in (make_data(), make_data(6, seed=1))
    )
    model = make_model()
    trained(model, train_data, eval_data)
    assert_same_state(state_of(model), expected)


def test_examples_and_any_order_of_the_mapping_train_to_the_same_weights(expected: dict[str, torch.Tensor]) -> None:
    tasks = {task.name: task for task in TASKS}
    train_data, eval_data = (
        {name: as_examples(data[name], tasks[name]) for name in reversed(data)}
        for data in (make_data(), make_data(6, seed=1))
    )
    model = make_model()
    trained(model, train_data, eval_data)
    assert_same_state(state_of(model), expected)


def changed(task: str, value: Any) -> dict[str, Any]:
    return {**make_data(4), task: value}


ROW = {"text": "w1", "label": "red"}


@pytest.mark.parametrize(
    ("train_data", "message"),
    [
        (
            [ROW],
            r"train_data: expected a mapping from the names of tasks to their data, such as {'colour': rows}; found",
        ),
        ({**make_data(4), "color": [ROW]}, r"train_data: Unknown task 'color'\. Did you mean 'colour'"),
        ({"colour": [ROW]}, "train_data: expected data of each task of the model, found none of mood, size"),
        (changed("colour", []), "train_data, task 'colour': expected at least one row"),
        (changed("colour", ROW), "train_data, task 'colour': expected a list .* found dict"),
        (changed("colour", [ROW, ROW]), r"task 'colour': label\(s\) blue never occur in the training rows"),
        (
            changed("colour", [ROW, {**ROW, "label": "rde"}]),
            "train_data, task 'colour', row 2: unknown label 'rde'.*'red'",
        ),
        (
            changed("colour", [{**ROW, "label": 1}]),
            "row 1: unknown label '1' .* If it is an index, write the label's name, 'red' .in a recipe: label_n",
        ),
        (changed("colour", [{**ROW, "label": 2}]), "row 1: unknown label '2' of task 'colour'. Known: blue, red"),
        (
            changed("colour", [{"label": "red"}]),
            "train_data, task 'colour', row 1: no column 'text'.* Rename the column, give it to the",
        ),
        (changed("colour", ["red"]), "train_data, task 'colour', row 1: expected a mapping with text and label, found"),
        (changed("mood", [{**ROW, "label": "bad"}]), "train_data, task 'mood', row 1: no column 'text_pair'"),
        (changed("size", [{**ROW, "label": "big"}]), "train_data, task 'size', row 1: expected a number as target"),
        (
            changed("size", [Example(0, "w1", None, 1.0)]),
            "task 'size', row 1: expected an example with task_id 2 or None",
        ),
    ],
)
def test_wrong_data_are_named_with_their_task_and_row(train_data: Any, message: str) -> None:
    with pytest.raises((DataError, TaskError), match=message):
        Trainer(make_model(), train_data)
    with pytest.raises((DataError, TaskError), match=message):
        make_model().fit_heads(train_data)


def test_wrong_evaluation_data_are_named() -> None:
    with pytest.raises(DataError, match="eval_data, task 'colour', row 1: unknown label 'rde'"):
        Trainer(make_model(), make_data(4), {"colour": [{**ROW, "label": "rde"}]})


def test_spellings_of_labels_are_warned_of_once_as_in_a_recipe(caplog: pytest.LogCaptureFixture) -> None:
    data = make_data(4)
    data["colour"][0]["label"] += " "
    Trainer(make_model(), data, {"colour": make_data(4)["colour"][:1]})
    assert sum("spell a label in several ways" in message for message in caplog.messages) == 1
    assert [message for message in caplog.messages if "rows with label" in message] == [
        "task 'colour': there are no evaluation rows with label red"
    ]


def test_labels_that_a_backbone_cannot_write_are_refused() -> None:
    tasks = [Task.classification("colour", ["purple", "red"])]
    data = {"colour": [{"text": "w1", "label": label} for label in ("purple", "red")]}
    with pytest.raises(TaskError, match="task 'colour': expected labels that the tokenizer can write"):
        Trainer(make_model("paper", "t5", tasks, feature_layer=None), data)


# What a trained model is ready for


@pytest.mark.parametrize("settings", [{"preset": "plus"}, FROZEN_TEXTS])
def test_a_trained_model_is_finished_and_nothing_is_written(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(**settings)
    assert not is_fitted(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfittedHeadsWarning)
        trained(model, make_data(), make_data(6, seed=1))
        model.predict(["red w1"], task="colour")
    assert not model.training
    assert unfitted_tasks(model.heads, model.tasks) == []
    assert is_fitted(model)
    assert model.pha.thresholds.isfinite().all()
    assert float(model.heads.target_mean[2]) == 15.0
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_writes_its_answers_is_trained(tmp_path: Path) -> None:
    tasks = [Task.classification("colour", ["blue", "red"])]
    model = make_model("paper", "gpt2", tasks)
    data = {"colour": make_data()["colour"]}
    scores = trained(model, data, data).evaluate()
    assert scores.keys() == {"eval_mean", "eval_colour_accuracy", "eval_routing_accuracy", "epoch"}
    assert model.pha.thresholds.tolist() == [-torch.inf]  # a single task declines nothing


def test_the_best_state_is_loaded_whether_it_was_held_in_memory_or_in_checkpoints(tmp_path: Path) -> None:
    """With a learning rate that destroys what was learned, the last state is not the best one."""
    options = {"max_steps": 12, "learning_rate": 0.1, "head_learning_rate": 0.1}
    states, means = [], []
    for strategy in ("no", "steps"):
        model = make_model("paper")
        saving = {"save_strategy": strategy, "save_steps": 2, "output_dir": str(tmp_path / "run")}
        trainer = trained(model, make_data(), make_data(6, seed=1), **options, **saving)
        states.append(state_of(model))
        means.append([entry["eval_mean"] for entry in trainer.state.log_history if "eval_mean" in entry])
        assert trainer.evaluate()["eval_mean"] == max(means[-1])
    assert means[0] == means[1]
    assert means[0].index(max(means[0])) < 5
    assert_same_state(states[0], states[1])
    last = make_model("paper")
    trained(last, make_data(), make_data(6, seed=1), **options, load_best_model_at_end=False)
    assert not torch.equal(last.method.prototypes.weight, states[0]["method.prototypes.weight"])


def test_training_resumes_from_its_checkpoints_to_the_same_state(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run")}

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    arguments = TrainingArguments(**SHORT, **saving)
    with pytest.raises(KeyboardInterrupt):
        Trainer(make_model(), make_data(), make_data(6, seed=1), arguments, callbacks=[Stop]).train()
    model = make_model()
    Trainer(model, make_data(), make_data(6, seed=1), arguments).train(resume_from_checkpoint=True)
    assert_same_state(state_of(model), expected)


def test_a_training_that_ended_before_its_heads_were_fitted_makes_no_further_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes one more step if it resumes from the last one."""
    options = {**SHORT, "lr_scheduler_type": "constant", "max_steps": 7, "eval_steps": 7, "save_strategy": "steps"}

    def die() -> None:
        raise KeyboardInterrupt

    whole = make_model()
    trained(whole, make_data(), make_data(6, seed=1), **options, save_steps=7, output_dir=tmp_path / "a")
    arguments = TrainingArguments(**options, save_steps=7, output_dir=tmp_path / "b")
    died = Trainer(make_model(), make_data(), make_data(6, seed=1), arguments)
    monkeypatch.setattr(died, "_finish", die)
    with pytest.raises(KeyboardInterrupt):
        died.train()
    resumed = make_model()
    trainer = Trainer(resumed, make_data(), make_data(6, seed=1), arguments)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == trainer.state.max_steps
    assert_same_state(state_of(resumed), state_of(whole))


def test_a_recipe_and_the_trainer_give_the_same_model(tmp_path: Path) -> None:
    data, backbone = make_data(), save_backbone(tmp_path / "backbone", "bert", initializer_range=0.3)
    entries = []
    for task in TASKS:
        pd.DataFrame(data[task.name]).to_json(tmp_path / f"{task.name}.jsonl", orient="records", lines=True)
        source = {"path": dict.fromkeys(("train", "validation"), f"{tmp_path}/{task.name}.jsonl")}
        entries.append({**task.model_dump(exclude_unset=True), "source": source})
    settings = {"max_steps": 6, "eval_steps": 2, "batch_size": 12, "label_smoothing": 0.1, "weight_decay": 0.1}
    sections = {"model": SIZES, "data": {"max_length": 32}, "training": settings, "tasks": entries}
    recipe = parse(Recipe, {"backbone": str(backbone), "seed": 3, **sections})
    run = train(recipe, tmp_path / "run")
    # A recipe draws the order of its training rows by the seed.
    ordered = {
        task.name: [row_of(example, task) for example in run.tasks[i].splits["train"]] for i, task in enumerate(TASKS)
    }
    transformers.set_seed(3)
    model = HyperAdapterModel.from_backbone(str(backbone), TASKS, max_length=32, **SIZES)
    Trainer(model, ordered, data, training_arguments(recipe, tmp_path / "memory")).train()
    assert_same_state(state_of(model), state_of(run.model))


# Evaluating and predicting


def test_predict_answers_rows_and_scores_those_with_labels() -> None:
    model = make_model("paper")
    trainer = trained(model, make_data(), max_steps=40, learning_rate=3e-3)
    test = make_data(8, seed=2)
    output = trainer.predict(test)
    assert [prediction.task for prediction in output.predictions] == [name for name in test for _ in range(8)]
    assert output.label_ids[:2] == [0, 1]
    assert output.metrics == {
        name.replace("eval", "test"): value for name, value in trainer.evaluate(test).items() if name != "epoch"
    }
    without = {"colour": [{"text": row["text"]} for row in test["colour"]], "size": test["size"]}
    partly = trainer.predict(without, metric_key_prefix="new")
    assert partly.metrics.keys() == {"new_mean", "new_size_pearson", "new_routing_accuracy"}
    assert partly.label_ids[:8] == [None] * 8
    assert [p.answer for p in partly.predictions[:8]] == [p.answer for p in output.predictions[:8]]
    assert trainer.predict({"colour": without["colour"]}).metrics == {}


def test_evaluate_needs_data() -> None:
    trainer = Trainer(make_model("paper"), make_data(4))
    with pytest.raises(DataError, match="evaluate: expected evaluation data, found none; pass them here or to the"):
        trainer.evaluate()
    assert trainer.evaluate({"colour": make_data(4)["colour"]}).keys() >= {"eval_colour_accuracy", "eval_mean"}
    assert trainer.evaluate(trainer.train_dataset).keys() >= {"eval_mood_accuracy", "eval_size_pearson"}


def test_callbacks_see_the_training_and_at_its_end_the_finished_model() -> None:
    events = []

    class Recorder(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            events.append("step")

        def on_evaluate(self, *arguments: Any, metrics: dict[str, float], **options: Any) -> None:
            events.append("evaluate")
            assert "eval_mean" in metrics

        def on_train_end(self, *arguments: Any, model: Any, **options: Any) -> None:
            events.append("end")
            assert is_fitted(model)
            assert not model.training

    arguments = TrainingArguments(**SHORT)
    Trainer(make_model(), make_data(), make_data(6), arguments, callbacks=[Recorder()]).train()
    assert events == [*["step", "step", "evaluate"] * 3, "end"]


def test_training_stops_early() -> None:
    # An accuracy does not change with steps this small; a correlation does, in its last digits.
    eval_data = {name: rows for name, rows in make_data(6).items() if name != "size"}
    options = {"max_steps": 100, "learning_rate": 1e-9, "early_stopping_patience": 2}
    trainer = trained(make_model("paper"), make_data(), eval_data, **options)
    assert trainer.state.global_step == 6


def test_save_model_writes_a_checkpoint_with_its_card(tmp_path: Path) -> None:
    model = make_model("paper")
    trainer = trained(model, make_data(), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    trainer.save_model()
    assert {path.name.split("-")[0] for path in (tmp_path / "run").iterdir()} >= {"README.md", "hyperadapter.json"}
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "run", tiny_backbone("bert", initializer_range=0.3))
    assert_same_state(state_of(loaded), state_of(model))


# Settings


def test_defaults_are_those_of_a_recipe() -> None:
    """`save_strategy` differs: a recipe is trained into a folder."""
    recipe = parse(
        Recipe,
        {"backbone": "b", "training": {"num_train_epochs": 3}, "tasks": [{"name": "t", "source": {"path": "p"}}]},
    )
    found, default = training_arguments(recipe, "trainer_output"), TrainingArguments()
    differing = {field.name for field in fields(default) if getattr(found, field.name) != getattr(default, field.name)}
    assert differing - {"logging_dir", "accelerator_config"} == {"save_strategy"}
    settings = {
        "num_train_epochs",
        "max_steps",
        "batch_size",
        "auto_batch",
        "eval_batch_size",
        "gradient_checkpointing",
    }
    renamed = {*settings, "label_smoothing", "optimizer", "report_to", "attention"}  # attention is the backbone's
    names = {field.name for field in fields(default)}
    assert set(TrainingConfig.model_fields) - renamed <= names
    assert {"sampling", "group_by_length"} <= names & set(DataConfig.model_fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "tempreature"}, r"sampling: .*Did you mean 'temperature'"),
        ({"sampling_temperature": 2.0}, "sampling_temperature: is for sampling 'temperature', found .*'proportional'"),
        ({"sampling": "temperature", "sampling_temperature": 0.5}, "temperature: .*found 0.5"),
        ({"prefix_cache": "file", "shard_backbone": True}, "prefix_cache: expected 'auto' or 'none' .*found 'file'"),
        ({"prefix_cache": "disk"}, r"TrainingArguments: 1 fault\n  prefix_cache: .*found 'disk'"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: .*found 0"),
        ({"false_decline_rate": 1.0}, "false_decline_rate: .*found 1.0"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: 'sequential' has no effect"),
        ({"push_to_hub": True}, r"push_to_hub: .* remove it, and call trainer\.push_to_hub\(\)"),
        ({"fsdp": "full_shard"}, "FSDP and DeepSpeed of accelerate, .* are not supported; .* set shard_backbone"),
        ({"report_to": "wandbb"}, r"report_to: Unknown logger 'wandbb'\. Did you mean 'wandb'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainingArguments(**settings)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_that_divides_the_weights_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(
        RecipeError, match=r"FSDP and DeepSpeed of accelerate, .* are not supported; .* set shard_backbone"
    ):
        TrainingArguments()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: has no effect, because the embeddings are frozen"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: has no effect, because the rows of an epoch"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: has no effect, because there are no validation"),
        ({"retriever_learning_rate": 0.1}, "retriever_learning_rate: has no effect, because method 'hyperformer'"),
        ({"false_decline_rate": 0.1}, "false_decline_rate: has no effect, because method 'hyperformer' cannot route"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    model = make_model("paper", method="hyperformer")
    with pytest.raises(RecipeError, match=message):
        Trainer(model, make_data(4), args=TrainingArguments(**settings))


def rates_by_parameter(model: Any, **settings: Any) -> dict[str, float]:
    optimizer = Trainer(model, make_data(4), args=TrainingArguments(**settings)).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_parts_of_a_model_with_a_common_adapter_have_their_own_default_learning_rates() -> None:
    rates = rates_by_parameter(make_model("plus"))
    assert rates["method.hypernetwork.common.down_weight"] == 1e-3
    assert rates["method.hypernetwork.up_weight.weight"] == rates["method.hypernetwork.layer_embeddings"] == 5e-5
    assert rates["method.prototypes.weight"] == rates["method.retriever.up.weight"] == 3e-3
    assert rates["heads.bias"] == 1e-2


class AtStep(TrainerCallback):
    """Keeps the trained parameters after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.parameters = step, dict[str, torch.Tensor]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            self.parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_the_common_adapter_is_trained_before_the_generated_part(schedule: str) -> None:
    model = make_model("plus")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    callback = AtStep(3)
    args = TrainingArguments(**{**SHORT, "eval_steps": 100, "lr_scheduler_type": schedule})
    trainer = Trainer(model, make_data(), args=args, callbacks=[callback])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_finish", lambda: None)
        trainer.train()
    changed: dict[str, list[bool]] = {"common": [], "generated": [], "other": []}
    for name, first in before.items():
        half, last = callback.parameters[name], model.get_parameter(name).detach()
        found = [not torch.equal(first, half), not torch.equal(half, last)]
        if name.startswith("method.hypernetwork.common."):
            assert found == [True, False], name
        elif name.startswith("method.hypernetwork."):
            assert not found[0], name
            changed["generated"].append(found[1])
        else:
            changed["other"] += found
    assert any(changed["generated"])
    assert any(changed["other"])


def test_a_schedule_that_depends_on_scores_is_refused_with_a_common_adapter() -> None:
    args = TrainingArguments(**{**SHORT, "lr_scheduler_type": "reduce_lr_on_plateau"})
    data, message = make_data(), "lr_scheduler_type: with a common adapter, .* found 'reduce_lr_on_plateau'"
    with pytest.raises(RecipeError, match=message):
        Trainer(make_model("plus"), data, data, args=args).train()
    Trainer(make_model("plus", common_adapter=False), data, data, args=args).train()


def test_an_optimizer_of_ones_own_trains_all_parts_in_all_steps() -> None:
    model = make_model("plus")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.method.hypernetwork.get_parameter("up_bias.bias").detach().clone()
    callback = AtStep(1)
    args = TrainingArguments(**{**SHORT, "lr_scheduler_type": "constant"})
    Trainer(model, make_data(), args=args, callbacks=[callback], optimizers=(optimizer, None)).train()
    assert not torch.equal(callback.parameters["method.hypernetwork.up_bias.bias"], before)


def test_learning_rates_of_parts_can_be_set() -> None:
    model = make_model("plus")
    rates = rates_by_parameter(model, learning_rate=0.5, hypernetwork_learning_rate=0.25, retriever_learning_rate=0.125)
    assert rates["method.hypernetwork.common.down_weight"] == 0.5
    assert rates["method.hypernetwork.up_weight.weight"] == 0.25
    assert rates["method.prototypes.weight"] == 0.125


def test_without_a_common_adapter_all_parts_but_heads_have_the_same_default_learning_rate() -> None:
    rates = rates_by_parameter(make_model("paper"))
    assert set(rates.values()) == {3e-4}


def test_a_model_with_a_common_adapter_is_the_same_after_loading(tmp_path: Path) -> None:
    model = make_model("plus")
    Trainer(model, make_data(), args=TrainingArguments(**SHORT)).train()
    model.save_pretrained(tmp_path / "model")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "model", tiny_backbone("bert", initializer_range=0.3))
    before, after = model.adapter_state_dict(), loaded.adapter_state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.method.hypernetwork.common["up_weight"].abs().max() > 0


def test_settings_of_transformers_alone_are_refused() -> None:
    arguments: Any = transformers.TrainingArguments()
    message = r"args: expected hyperadapters\.TrainingArguments, found transformers\.Train.*; import them from hyperad"
    with pytest.raises(RecipeError, match=message):
        Trainer(make_model(), make_data(4), args=arguments)
    with pytest.raises(TaskError, match="model: expected a HyperAdapterModel, found BertModel"):
        Trainer(tiny_backbone("bert"), make_data(4))  # type: ignore[arg-type]


def test_the_given_settings_are_not_changed() -> None:
    arguments = TrainingArguments(**SHORT, label_smoothing_factor=0.1)
    before = arguments.to_dict()
    trainer = Trainer(make_model("paper"), make_data(4), args=arguments)
    assert arguments.to_dict() == before
    assert trainer.args.label_smoothing_factor == 0.1


def test_label_smoothing_and_reduction_change_the_loss() -> None:
    losses = []
    for settings in ({}, {"label_smoothing_factor": 0.3}, {"reduction": "sum"}):
        trainer = Trainer(make_model("paper"), make_data(4), args=TrainingArguments(**SHORT, **settings))
        batch = next(iter(trainer.get_train_dataloader()))
        losses.append(trainer.compute_loss(trainer.model.eval(), dict(batch)).item())
    assert len(set(losses)) == 3


# Heads that are not fitted


def test_exporting_with_heads_that_are_not_fitted_warns_of_them(tmp_path: Path) -> None:
    with pytest.warns(UnfittedHeadsWarning, match=r"the heads of colour, mood, size "):
        write_task_files(make_model(**FROZEN_TEXTS), "mood", tmp_path)


def test_a_loop_that_forgets_to_fit_the_heads_is_warned_once(tmp_path: Path) -> None:
    model = make_model(**FROZEN_TEXTS)
    with pytest.warns(UnfittedHeadsWarning, match=r"the heads of colour, mood, size .*model\.fit_heads.*Trainer"):
        model.predict(["red w1"], task="colour")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(["red w1"], task="colour")
        model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, tiny_backbone("bert", initializer_range=0.3))
    with pytest.warns(UnfittedHeadsWarning, match="colour, mood, size") as found:
        loaded.save_pretrained(tmp_path)
    assert found[0].filename == __file__


def test_fitted_heads_are_not_warned_of(tmp_path: Path) -> None:
    model = make_model(**FROZEN_TEXTS)
    model.fit_heads(make_data(), {"colour": make_data(6, seed=1)["colour"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfittedHeadsWarning)
        model.predict(["red w1"], task="colour")
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be fitted again"):
        model.fit_heads(make_data())
    with pytest.raises(ValueError, match="cannot be fitted again"):
        Trainer(model, make_data(), args=TrainingArguments(**SHORT)).train()


def test_fit_heads_does_what_the_trainer_does_at_the_end() -> None:
    expected, model = make_model(**FROZEN_TEXTS), make_model(**FROZEN_TEXTS)
    trained(expected, make_data(), make_data(6, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyperadapters.training.trainer.fit_text_heads", lambda *arguments: None)
        trained(model, make_data(), make_data(6, seed=1))
    assert unfitted_tasks(model.heads, model.tasks) == ["colour", "mood", "size"]
    model.fit_heads(make_data(), make_data(6, seed=1))
    assert_same_state(state_of(model), state_of(expected))


def test_a_head_whose_features_say_nothing_counts_as_fitted() -> None:
    data = make_data()
    data["size"] = [{"text": "w1", "label": 2.0} for _ in range(4)]
    model = make_model(**FROZEN_TEXTS)
    model.fit_heads(data)
    head = model.heads.head(2)
    assert not head.weight[:, : model.heads.features_size].any()
    assert unfitted_tasks(model.heads, model.tasks) == []


def test_one_unfitted_head_among_others_is_named() -> None:
    model = make_model(**FROZEN_TEXTS)
    fresh = model.heads.head(1)
    fresh = fresh._replace(weight=fresh.weight.clone())
    model.fit_heads(make_data())
    heads = model.heads.unpack()
    model.task_table.set_heads([heads[0], fresh, heads[2]])
    assert unfitted_tasks(model.heads, model.tasks) == ["mood"]


def test_models_without_such_heads_have_nothing_to_fit() -> None:
    for model in (make_model("paper"), make_model("paper", "gpt2", TASKS[:1])):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnfittedHeadsWarning)
            model.predict(["red w1"], task="colour")
        with pytest.raises(
            TaskError, match=r"expected a model whose heads read features of the texts.*no heads need to be fitted"
        ):
            model.fit_heads(make_data())


def test_a_training_that_was_interrupted_leaves_a_model_that_is_warned_of() -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            raise HyperAdaptersError("stopped")

    model = make_model(**FROZEN_TEXTS)
    with pytest.raises(HyperAdaptersError, match="stopped"):
        Trainer(model, make_data(), args=TrainingArguments(**SHORT), callbacks=[Stop]).train()
    with pytest.warns(UnfittedHeadsWarning):
        model.predict(["red w1"], task="colour")


@pytest.mark.parametrize("name", ["mean", "eval_mean", "colour_accuracy", "eval_routing_accuracy"])
def test_the_best_state_can_be_that_of_any_score(name: str) -> None:
    Trainer(make_model("paper"), make_data(4), make_data(4), TrainingArguments(**SHORT, metric_for_best_model=name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("color_accuracy", "Unknown score 'color_accuracy'. Did you mean 'colour_accuracy'"),
        ("size_pearson", "Unknown score 'size_pearson'.* Known: colour_accuracy, mean, routing_accuracy"),
    ],
)
def test_a_score_that_no_evaluation_has_is_named_before_training(name: str, message: str) -> None:
    eval_data = {"colour": make_data(4)["colour"]}
    with pytest.raises(RecipeError, match=f"metric_for_best_model: {message}"):
        Trainer(make_model("paper"), make_data(4), eval_data, TrainingArguments(metric_for_best_model=name))


def test_arguments_are_read_from_a_command_line() -> None:
    parser = transformers.HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(["--sampling", "balanced", "--report_to", "none"])
    assert arguments.sampling == "balanced"
    assert arguments.report_to == []


@pytest.mark.parametrize("is_named", [False, True])
def test_resuming_without_a_checkpoint_says_what_is_missing(is_named: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if is_named:
        make_model("paper").save_pretrained(folder)
    trainer = Trainer(make_model("paper"), make_data(4), args=TrainingArguments(output_dir=str(folder), **SHORT))
    with pytest.raises(CheckpointError, match=r"resume_from_checkpoint: expected .* found none in '.*run'; give its"):
        trainer.train(resume_from_checkpoint=str(folder) if is_named else True)


def test_resuming_passes_over_a_checkpoint_that_was_not_written_to_its_end(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, **SHORT)
    Trainer(make_model("paper"), make_data(4), args=arguments).train()
    (tmp_path / "checkpoint-8").mkdir()
    trainer = Trainer(make_model("paper"), make_data(4), args=arguments)
    assert trainer.train(resume_from_checkpoint=True).global_step == SHORT["max_steps"]


def test_metrics_and_state_are_written_to_a_new_folder(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "new" / "run"), **SHORT)
    trainer = Trainer(make_model("paper"), make_data(4), args=arguments)
    trainer.save_state()
    trainer.save_metrics("train", {"train_loss": 1.0})
    written = {path.name for path in (tmp_path / "new" / "run").iterdir()}
    assert written == {"trainer_state.json", "train_results.json", "all_results.json"}


def test_a_trainer_uploads_the_model_with_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def record(model: Any, *names: str, **options: Any) -> None:
        calls.append((names, options))

    monkeypatch.setattr(HyperAdapterModel, "push_to_hub", record)
    trainer = Trainer(make_model("paper"), make_data(4), args=TrainingArguments(hub_private_repo=True))
    with pytest.raises(RecipeError, match="hub_model_id: expected a name such as 'user/name'"):
        trainer.push_to_hub()
    trainer.args.hub_model_id = "user/name"
    trainer.push_to_hub("Trained longer", token="token")
    options = {"private": True, "token": "token", "commit_message": "Trained longer", "revision": None}
    assert calls == [(("user/name",), options)]
