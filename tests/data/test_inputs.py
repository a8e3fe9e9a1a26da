"""What can be given as inputs, examples and labels."""

from __future__ import annotations

import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from helpers import save_backbone, tiny_backbone, tiny_language_model_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hyperadapters.config import DataConfig, Lengths, ModelConfig, Recipe, Task, TaskEntry, parse
from hyperadapters.data.collate import make_collator
from hyperadapters.data.examples import Example, infer_labels, read_target, warn_of_spellings
from hyperadapters.data.loading import load_task
from hyperadapters.data.rows import iterate_rows, plain
from hyperadapters.data.sources import Row
from hyperadapters.errors import DataError, HyperAdaptersError, RecipeError, TaskError
from hyperadapters.inference.inputs import read_inputs, with_columns
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import calibrate
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.evaluation import evaluate
from hyperadapters.training.run import train

TASKS = (Task.classification("mood", ["bad", "good"]), Task.regression("alike", fields=["text", "text_pair"]))
COLUMNS = {"text": ["a", "b"], "task": ["mood", "alike"], "text_pair": [None, "c"]}
ROWS = [{"text": "w1", "label": "a"}, {"text": "w2", "label": "b"}]
EXPECTED = [Example(0, "a"), Example(1, "b", "c")]


@pytest.mark.parametrize("make", [pd.DataFrame, Dataset.from_dict, pa.table])
def test_tables_are_rows(make: Any) -> None:
    assert list(read_inputs(make(COLUMNS), TASKS, None)) == EXPECTED


@pytest.mark.parametrize("make", [pd.Series, np.array, pa.array])
def test_columns_of_texts_are_rows(make: Any) -> None:
    assert list(read_inputs(make(["a", "b"]), TASKS, "mood")) == [Example(0, "a"), Example(0, "b")]


def test_an_array_of_two_columns_holds_pairs() -> None:
    assert list(read_inputs(np.array([["a", "b"]]), TASKS, "alike")) == [Example(1, "a", "b")]


def test_an_iterable_data_set_is_rows() -> None:
    assert list(read_inputs(Dataset.from_dict(COLUMNS).to_iterable_dataset(), TASKS, None)) == EXPECTED


NAMED_ROWS = [
    lambda frame: [row for _, row in frame.iterrows()],
    lambda frame: list(frame.itertuples()),
    lambda frame: list(frame.itertuples(index=False)),
    lambda frame: list(frame.to_records(index=False)),
    lambda frame: list(pa.array(frame.to_dict("records"))),
]


@pytest.mark.parametrize("rows_of", NAMED_ROWS)
def test_rows_whose_values_have_names_are_read_by_these(rows_of: Any) -> None:
    frame = pd.DataFrame({"text": ["w1", "w2"], "label": ["bad", "good"]})
    assert list(read_inputs(rows_of(frame), TASKS, None)) == [Example(None, "w1"), Example(None, "w2")]
    model = HyperAdapterModel(tiny_backbone("bert"), [Task.regression("number")])
    model.tokenizer = tiny_tokenizer()
    model.add_task(Task.classification("mood", []), rows_of(frame), fit="none")
    assert model.tasks[1].labels == ("bad", "good")


@pytest.mark.parametrize("cell", [np.array(["a", "b"]), pd.Series(["a", "b"]), ["a", "b"]])
def test_a_cell_that_holds_several_values_is_refused(cell: Any) -> None:
    with pytest.raises(DataError, match="input 1: expected a string in 'text_pair', found"):
        list(read_inputs([{"text": "a", "text_pair": cell}], TASKS, None))
    with pytest.raises(TaskError, match="input 1: Unknown task"):
        list(read_inputs([{"text": "a", "task": cell}], TASKS, None))


@pytest.mark.parametrize("empty", [None, float("nan"), pd.NA, pd.NaT, np.float32("nan"), ""])
def test_an_empty_cell_is_no_task_and_no_second_text(empty: Any) -> None:
    frame = pd.DataFrame({"text": ["a"], "task": [empty], "text_pair": [empty]}, dtype=object)
    assert list(read_inputs(frame, TASKS, None)) == [Example(None, "a")]
    assert list(read_inputs(frame, TASKS, "mood")) == [Example(0, "a")]


def test_the_columns_of_texts_can_be_named() -> None:
    row = Row({"text": "other", "id": 7, "b": "second", "a": "first"}, "a.csv, line 2")
    assert list(with_columns([row], [])) == [row]
    assert list(with_columns([row], ["a"])) == [Row({"text": "first", "id": 7, "b": "second"}, row.place)]
    assert list(with_columns([row], ["a", "b"])) == [Row({"text": "first", "text_pair": "second", "id": 7}, row.place)]
    assert list(with_columns([row], ["a", "text"])) == [
        Row({"text": "first", "text_pair": "other", "id": 7, "b": "second"}, row.place)
    ]
    with pytest.raises(DataError, match=r"a.csv, line 2: Unknown column 'c'. Known: a, b, id, text"):
        list(with_columns([row], ["c"]))
    with pytest.raises(DataError, match="expected one or two columns of texts, found a, b, c"):
        with_columns([row], ["a", "b", "c"])


def test_the_column_of_the_label_can_be_named() -> None:
    row = Row({"text": "first", "label": "draft", "class": "yes", "id": 7}, "a.csv, line 2")
    assert list(with_columns([row], [], "class")) == [Row({"label": "yes", "text": "first", "id": 7}, row.place)]
    assert list(with_columns([row], ["class"], "label")) == [Row({"text": "yes", "label": "draft", "id": 7}, row.place)]
    with pytest.raises(DataError, match=r"a.csv, line 2: Unknown column 'clas'. Did you mean 'class'\?"):
        list(with_columns([row], [], "clas"))


@pytest.mark.parametrize("empty", [None, float("nan"), pd.NA])
def test_an_empty_cell_is_no_text(empty: Any) -> None:
    with pytest.raises(DataError, match=r"input 1: expected a string in 'text_pair', found (None|nan)"):
        list(read_inputs([("a", empty)], TASKS, "alike"))
    with pytest.raises(DataError, match=r"input 1: expected a string in 'text', found (None|nan)"):
        list(read_inputs([{"text": empty}], TASKS, "mood"))


@pytest.mark.parametrize(
    ("row", "advice"),
    [({"texts": "a"}, r"Did you mean 'texts'\? Found: texts"), ({"sentence": "a"}, "Found: sentence")],
)
def test_a_column_of_another_name_is_named(row: dict[str, str], advice: str) -> None:
    with pytest.raises(
        DataError,
        match=rf"input 1: no column 'text'\. {advice}\. Rename the column, give it to the command with --text COLUMN",
    ):
        list(read_inputs([row], TASKS, "mood"))


@pytest.mark.parametrize("make", [DatasetDict, IterableDatasetDict])
def test_a_data_set_of_several_splits_is_refused_by_name(make: Any) -> None:
    with pytest.raises(DataError, match=rf"found {make.__name__}; pass one of its splits"):
        read_inputs(make(train=Dataset.from_dict(COLUMNS)), TASKS, None)


def test_a_table_that_is_not_of_rows_is_refused() -> None:
    with pytest.raises(DataError, match="expected a list, a DataFrame or another iterable of rows, found DataFrameGr"):
        read_inputs(pd.DataFrame(COLUMNS).groupby("task"), TASKS, None)


@pytest.mark.parametrize("wrong", [b"a", {"a": 1}, {"a"}, 3, None, DatasetDict(), np.array([["a", "b", "c"]])])
def test_what_has_no_rows_is_refused_at_the_call(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"inputs: expected .*, found"):
        read_inputs(wrong, TASKS, None)


@pytest.mark.parametrize("pair", [("a", "b"), {"text": "a", "text_pair": "b"}, Example(None, "a", "b")])
def test_a_second_text_that_the_task_does_not_read_is_refused(pair: Any) -> None:
    with pytest.raises(DataError, match="input 1: found a text_pair, which task 'mood' does not read"):
        list(read_inputs([pair], TASKS, "mood"))


@pytest.mark.parametrize(
    "value", [1, 1.0, np.int64(1), np.float32(1), Decimal("1"), pa.scalar(1), "1\u00a0", "1\u200b"]
)
def test_labels_of_every_type_are_one_label(value: Any) -> None:
    assert infer_labels([Row({"label": value}, "row"), Row({"label": "1"}, "row")], TASKS[0]) == ("1",)


@pytest.mark.parametrize("value", [2, np.float64(2), np.int8(2), Decimal("2"), pa.scalar(2.0), "2"])
def test_numbers_of_every_type_are_targets(value: Any) -> None:
    assert read_target(Row({"label": value}, "row"), TASKS[1]) == 2.0


@pytest.mark.parametrize("labels", ["abc", {"a", "b"}, 3])
def test_labels_without_an_order_are_refused(labels: Any) -> None:
    with pytest.raises(TaskError, match="expected a list of labels in order"):
        Task.classification("mood", labels)


@pytest.mark.parametrize("labels", [["yes", "yes "], ["caf\u00e9", "cafe\u0301"]])
def test_two_spellings_of_a_label_are_refused(labels: list[str]) -> None:
    with pytest.raises(TaskError, match=r"labels must be different from each other, found '.*' and '.*'"):
        Task.classification("mood", labels)


UNWRITABLE = [["{}", "[]"], ["red  blue", "w1"], ["w1 w2 w3 w4 w5", "w1 w2 w3 w4 w6"]]


@pytest.mark.parametrize("labels", UNWRITABLE)
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_labels_that_cannot_be_written_are_refused_before_training(
    tmp_path: Path, kind: str, labels: list[str]
) -> None:
    rows = "".join(json.dumps({"text": f"w{index}", "label": label}) + "\n" for index, label in enumerate(labels * 4))
    (tmp_path / "rows.jsonl").write_text(rows)
    values = {
        "backbone": str(save_backbone(tmp_path / kind, kind)),
        "model": {"adapter_dim": 2},
        "data": {"max_length": 32, "max_target_length": 5},
        "training": {"max_steps": 1},
        "tasks": [{"name": "odd", "source": {"path": {"train": str(tmp_path / "rows.jsonl")}}}],
    }
    with pytest.raises(TaskError, match="task 'odd': expected labels that the tokenizer can write, found"):
        train(parse(Recipe, values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize(
    ("task", "labels"),
    [*((Task.classification("odd", labels), labels) for labels in UNWRITABLE), (Task.regression("odd"), [0.5, 1.5])],
)
def test_targets_that_cannot_be_written_are_refused_for_a_new_task(kind: str, task: Task, labels: list[Any]) -> None:
    model = _writing_model(kind, [Task.classification("mood", ["bad", "good"])])
    before = {name: value.clone() for name, value in model.adapter_state_dict().items()}
    examples = [{"text": "w1", "label": label} for label in labels]
    with pytest.raises(TaskError, match=r"task 'odd': expected (labels|numbers) that the tokenizer can write, found"):
        model.add_task(task, examples)
    assert [known.name for known in model.tasks] == ["mood"]
    after = model.adapter_state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    with pytest.raises(TaskError, match=r"task 'odd': expected (labels|numbers) that the tokenizer can write, found"):
        _writing_model(kind, [task]).refit_task("odd", examples)


def test_numbers_that_the_tokenizer_can_write_are_accepted() -> None:
    words = WordLevel({"<unk>": 0, "0.5": 1, "1.0": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    task = Task.regression("alike", step=0.5)
    collator = make_collator("encoder-decoder", tokenizer, [task])
    collator.check_targets(task, [Example(0, "w1", None, number) for number in (0.4, 1, 1.1)])
    with pytest.raises(TaskError, match=r"numbers that the tokenizer can write, found '2.5' \(read back as ''\)"):
        collator.check_targets(task, [Example(0, "w1", None, 2.4)])


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize("token", ["</s>", "<pad>"])
def test_target_texts_that_spell_a_special_token_are_refused(kind: str, token: str) -> None:
    task = Task.text_to_text("copy")
    model = _writing_model(kind, [task])
    model.tokenizer.pad_token = "<pad>"
    examples = [{"text": "w1", "label": "w2"}, {"text": f"w3 {token}", "label": f"w4 {token} w5"}]
    with pytest.raises(TaskError, match=rf"found '{token}' in 'w4 {token} w5', the target of 'w3 {token}'"):
        model.refit_task("copy", examples)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_target_texts_that_the_tokenizer_cannot_write_are_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    task = Task.text_to_text("copy")
    collator = _writing_model(kind, [task]).collator
    examples = [Example(0, "w1", None, target) for target in ("w1", "w2 other", "unheard", "")]
    collator.check_targets(task, examples)
    assert caplog.messages == [
        "task 'copy': 2 of 4 target texts have parts for which the tokenizer has no tokens, so that generated "
        "texts lack them; the first is 'w2 other'"
    ]


@pytest.mark.parametrize("other", ["x\u00a0y", "x  y", "x\u2009y", "x\u00ad y", "x \u200dy", "\uff38 y"])
def test_labels_that_look_alike_are_told_with_both_spellings(other: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_spellings(Task.classification("mood", ["x y", "z", other]), [])
    assert f"remain different labels: 'x y' and {other!a}; if they are one label" in caplog.text


SPELLINGS = ["Spam", "spam", "spam\u00a0", "caf\u00e9", "cafe\u0301"]


def test_spellings_of_one_label_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "w1", "label": label} for label in SPELLINGS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": {"train": str(tmp_path / "rows.jsonl")}}
    merged = (
        "task 'mood': the rows spell a label in several ways, which are read as one label: "
        r"'spam' and 'spam\xa0'; 'cafe\u0301' and 'caf\xe9'"
    )
    kept = (
        "task 'mood': labels differ only in case, spaces or characters that look alike or are invisible, and "
        "remain different labels: 'Spam' and 'spam'"
    )
    expected = [merged, f"{kept}; if they are one label, spell it in one way"]
    assert load_task(parse(TaskEntry, {"name": "mood", "source": source}), 0, DataConfig(), 0).task.labels == (
        "Spam",
        "caf\u00e9",
        "spam",
    )
    assert caplog.messages == expected
    caplog.clear()
    model = HyperAdapterModel(tiny_backbone("bert"), [Task.regression("alike")], ModelConfig(adapter_dim=4))
    model.tokenizer = tiny_tokenizer()
    model.add_task(Task(name="mood"), rows, fit="none")
    assert caplog.messages == expected


def test_label_names_apply_to_every_spelling_of_a_label(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "w1", "label": label}) + "\n" for label in ["spam", "spam\u00a0", "ham"])
    )
    source = {"path": {"train": str(tmp_path / "rows.jsonl")}, "label_names": {"spam ": "bad"}}
    entry = parse(TaskEntry, {"name": "mood", "source": source})
    assert load_task(entry, 0, DataConfig(), 0).task.labels == ("bad", "ham")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [4, 0.2])
def test_a_cut_keeps_a_row_of_each_label_for_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: float, seed: int
) -> None:
    rows = [("t", label) for label in ["a"] * 14 + ["b"] * 5 + ["rare"]]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(f"{text},{label}" for text, label in rows))
    source = {"path": str(tmp_path / "rows.csv"), "held_out": {"validation": {"size": size}, "test": {"size": 4}}}
    entry = parse(TaskEntry, {"name": "mood", "source": source})
    with caplog.at_level(logging.WARNING):
        data = load_task(entry, 0, DataConfig(), seed)
    assert data.task.labels == ("a", "b", "rare")
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [12, 4, 4]
    for split in ("validation", "test"):
        assert sorted(example.target for example in data.splits[split]) == [0, 0, 0, 1]
        assert f"there are no {split} rows with label rare" in caplog.text


@pytest.mark.parametrize(("size", "wanted", "found"), [(4, 4, 2), (0.8, 4, 2), (3, 3, 2), (2, 2, 2), (1, 1, 1)])
def test_a_cut_leaves_the_last_row_of_each_label_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: float, wanted: int, found: int
) -> None:
    _write_labels(tmp_path / "rows.jsonl", ["a", "a ", "b", "b", "c"])
    source = {"path": str(tmp_path / "rows.jsonl"), "held_out": {"validation": {"size": size}}}
    data = load_task(parse(TaskEntry, {"name": "mood", "source": source}), 0, DataConfig(), 0)
    assert len(data.splits["validation"]) == found
    assert {example.target for example in data.splits["train"]} == {0, 1, 2}
    message = (
        f"task 'mood': only {found} rows of train were held out for validation, not {wanted}, so that one row of each "
        "label remains in the training rows"
    )
    assert (message in caplog.messages) == (wanted > found)


def test_a_cut_from_other_rows_than_those_of_training_may_take_every_row_of_a_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_labels(tmp_path / "train.jsonl", ["a", "b", "c"])
    _write_labels(tmp_path / "validation.jsonl", ["a", "b", "c"])
    path = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    source = {"path": path, "held_out": {"test": {"from": "validation", "size": 2}}}
    data = load_task(parse(TaskEntry, {"name": "mood", "source": source}), 0, DataConfig(), 0)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 3, "validation": 1, "test": 2}
    lacking = [message.partition(" rows with label ")[::2] for message in caplog.messages]
    assert [start for start, _ in lacking] == ["task 'mood': there are no validation", "task 'mood': there are no test"]
    assert [len(labels.split(", ")) for _, labels in lacking] == [2, 1]


@pytest.mark.parametrize(
    "options", [{"cache_bytes": -1}, {"batch_size": "8"}, {"batch_size": True}, {"route": None}, {"decline": "no"}]
)
def test_wrong_options_of_a_predictor_are_refused_where_they_are_given(options: dict[str, Any]) -> None:
    with pytest.raises(HyperAdaptersError, match=r"expected|Unknown route 'None'"):
        Predictor(_model(), **options)


def test_wrong_arguments_of_a_call_are_refused_at_the_call() -> None:
    model = _model()
    with pytest.raises(DataError, match=r"inputs: expected .* found NoneType"):
        Predictor(model)(None)
    with pytest.raises(TaskError, match="task: expected the name of a task, found a int; pass its name"):
        Predictor(model)(["w1"], task=3)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="task: expected the name of a task, found a Task; pass its name"):
        model.predict(["w1"], task=model.tasks[0])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="batch_size: expected an integer of 1 or more, found 0"):
        model.route(["w1"], batch_size=0)


@pytest.mark.parametrize("option", ["seed", "max_steps", "k_per_label"])
@pytest.mark.parametrize("value", [True, 1.0, "1", -1])
def test_numbers_of_other_types_are_refused_for_a_new_task(option: str, value: Any) -> None:
    model = _model()
    model.tokenizer = tiny_tokenizer()
    message = rf"{option}: expected an integer of [01] or more, found {value!r}"
    with pytest.raises(HyperAdaptersError, match=message):
        model.add_task(Task.classification("new", ["a", "b"]), ROWS, **{option: value})
    with pytest.raises(HyperAdaptersError, match=message):
        model.refit_task(
            "mood",
            [{**row, "label": label} for row, label in zip(ROWS, ["bad", "good"], strict=True)],
            **{option: value},
        )
    assert [task.name for task in model.tasks] == ["mood", "alike"]


def test_integers_of_numpy_are_accepted_for_a_new_task() -> None:
    model = _model()
    model.tokenizer = tiny_tokenizer()
    options = dict.fromkeys(("seed", "max_steps", "k_per_label"), np.int64(1))
    assert model.add_task(Task.classification("new", ["a", "b"]), ROWS, **options).examples == 2


ONE = Example(0, "w1")


@pytest.mark.parametrize(
    ("train_rows", "validation_rows", "options", "message"),
    [
        ([], [], {}, "train_examples: expected at least one example, found none"),
        (["w1"], [], {}, r"train_examples: expected a list of Example, found \['w1'\]"),
        (iter([ONE]), [], {}, "train_examples: expected a list of Example, found"),
        ([ONE], None, {}, "validation_examples: expected a list of Example, found None"),
        ([Example(None, "w1")], [], {}, "train_examples: expected task_id from 0 to 1, found None"),
        ([ONE], [Example(7, "w1")], {}, "validation_examples: expected task_id from 0 to 1, found 7"),
        ([ONE], [], {"false_decline_rate": False}, r"false_decline_rate: expected a number in \[0, 1\), found False"),
        ([ONE], [], {"false_decline_rate": "0.1"}, r"false_decline_rate: expected a number in \[0, 1\), found '0.1'"),
        ([ONE], [], {"seed": 1.0}, "seed: expected an integer of 0 or more, found 1.0"),
    ],
)
def test_wrong_arguments_of_a_calibration_are_refused(
    train_rows: Any, validation_rows: Any, options: dict[str, Any], message: str
) -> None:
    model = _model()
    model.tokenizer = tiny_tokenizer()
    before = model.method.thresholds.clone()
    with pytest.raises(HyperAdaptersError, match=message):
        calibrate(model, train_rows, validation_rows, **options)
    assert torch.equal(model.method.thresholds, before)


@pytest.mark.parametrize("tasks", [TASKS[0], ["mood"], set(TASKS), {"mood": TASKS[0]}])
def test_tasks_that_are_no_list_of_tasks_are_refused(tasks: Any) -> None:
    with pytest.raises(TaskError, match=r"tasks: expected .*, found|tasks: expected Task, .*; found 'mood'"):
        HyperAdapterModel(tiny_backbone("bert"), tasks)


@pytest.mark.parametrize("shape", [(1,), (2, 1), ()])
def test_head_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TaskError, match=r"labels: expected a tensor of shape \(2,\), found shape"):
        _model()(ids, task_ids=torch.tensor([0, 1]), labels=torch.zeros(shape), sequence_ids=torch.zeros_like(ids))


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(2, dtype=torch.long),
        torch.zeros(1, 3, dtype=torch.long),
        torch.zeros(2, 0, dtype=torch.long),
        torch.zeros(2, 3),
        [[1], [2]],
    ],
)
def test_token_labels_of_another_shape_or_type_are_refused(labels: Any) -> None:
    model = _writing_model("t5", [TASKS[0]])
    with pytest.raises(TaskError, match=r"labels: expected token ids of shape \(2, T\), T at least 1, found"):
        model(torch.ones(2, 3, dtype=torch.long), task_ids=torch.tensor([0, 0]), labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 0], r"labels\[1\]: expected an index from 0 to 1 for task 'mood', found 2"),
        ([-1, 0, 0], r"labels\[0\]: expected an index from 0 to 1 for task 'mood', found -1"),
        ([0, 0.5, 0], r"labels\[1\]: expected an index from 0 to 1 for task 'mood', found 0.5"),
        ([0, np.nan, 0], r"labels\[1\]: expected an index from 0 to 1 for task 'mood', found nan"),
        ([0, 0, np.inf], r"labels\[2\]: expected a finite number for task 'alike', found inf"),
    ],
)
def test_head_labels_out_of_range_are_refused(labels: list[float], message: str) -> None:
    ids = torch.ones(3, 3, dtype=torch.long)
    inputs = {"input_ids": ids, "sequence_ids": torch.zeros_like(ids), "task_ids": torch.tensor([0, 0, 1])}
    with pytest.raises(TaskError, match=message):
        _model()(**inputs, labels=torch.tensor(labels))


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize("token", [-1, 51])
def test_token_ids_out_of_range_are_refused(kind: str, token: int) -> None:
    model, ids = _writing_model(kind, [TASKS[0]]), torch.ones(2, 3, dtype=torch.long)
    wrong, task_ids = ids.clone(), torch.tensor([0, 0])
    wrong[1, 2] = token
    with pytest.raises(TaskError, match=rf"^labels\[1, 2\]: expected -100 or a token id from 0 to 50.*found {token}"):
        model(ids, task_ids=task_ids, labels=wrong)
    message = rf"^input_ids\[1, 2\]: expected a token id from 0 to 50.*found {token}"
    with pytest.raises(TaskError, match=message):
        model(wrong, task_ids=task_ids, labels=ids)
    with pytest.raises(TaskError, match=message):
        model.generate(wrong, task_ids=task_ids)


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("wrong", [[[1, 1]], IDS[0], IDS.float(), IDS[:, :0]])
def test_input_ids_of_another_shape_or_type_are_refused(kind: str, wrong: Any) -> None:
    model = _model() if kind == "bert" else _writing_model(kind, [TASKS[0]])
    with pytest.raises(TaskError, match=r"input_ids: expected token ids of shape \[rows, tokens\], found"):
        model(wrong, task_ids=torch.tensor([0, 0]), decoder_input_ids=IDS)


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "prompt_mask", "sequence_ids"])
@pytest.mark.parametrize("wrong", [IDS[:1], IDS[:, :2], IDS.tolist()])
def test_inputs_of_another_shape_than_the_token_ids_are_refused(name: str, wrong: Any) -> None:
    with pytest.raises(TaskError, match=rf"{name}: expected the shape \(2, 3\) of input_ids, found"):
        _model()(IDS, task_ids=torch.tensor([0, 0]), **{name: wrong})


@pytest.mark.parametrize("wrong", [{"reduction": "max"}, {"label_smoothing": "a"}, {"label_smoothing": 2.0}])
def test_unknown_settings_of_the_loss_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=r"reduction 'max'|label_smoothing: expected a number from 0 to 1, found"):
        _model()(IDS, task_ids=torch.tensor([0, 0]), labels=torch.zeros(2), **wrong)


@pytest.mark.parametrize("task_id", ["mood", 0.5, True, -1, 2])
def test_examples_of_another_task_id_than_an_index_are_refused(task_id: Any) -> None:
    with pytest.raises(TaskError, match=rf"input 1: task_id: expected 0 to 1, found {task_id!r}"):
        list(read_inputs([Example(task_id, "w1")], TASKS, None))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (iter([Example(0, "w1", None, 0)]), "expected a list of Example, found"),
        ([{"text": "w1", "label": "bad"}], "expected a list of Example, found"),
        ([Example(0, "w1", None, 2)], "example 1: expected the index of a label, 0 to 1 as target of task 'mood', fou"),
        ([Example(0, "w1", None, "bad")], "example 1: expected the index of a label, 0 to 1 as target of task 'mood'"),
        ([Example(1, "w1", "w2", "2")], "example 1: expected a finite number as target of task 'alike', found '2'"),
        ([Example(1, "w1", "w2", np.nan)], "example 1: expected a finite number as target of task 'alike', found nan"),
    ],
)
def test_examples_that_cannot_be_scored_are_refused(examples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(_model(), examples)


@pytest.mark.parametrize("label", ["", " ", "\u200b", "\u00a0"])
def test_a_label_that_nobody_can_see_is_refused(label: str) -> None:
    with pytest.raises(TaskError, match="labels must have a visible character, found"):
        Task.classification("mood", ["a", label])


@pytest.mark.parametrize("settings", [{"config": {"adapter_dim": 2}}, {"lengths": 12}])
def test_settings_of_a_model_of_another_type_are_refused(settings: Any) -> None:
    with pytest.raises(RecipeError, match="expected config as a ModelConfig, and lengths as Lengths; found"):
        HyperAdapterModel(tiny_backbone("bert"), TASKS, **settings)


def test_a_seed_that_not_every_library_takes_is_refused() -> None:
    model = _model()
    model.tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match=r"seed: expected an integer below 2 \*\* 32, found 4294967296"):
        model.add_task(Task.classification("new", ["a", "b"]), ROWS, seed=2**32)
    with pytest.raises(DataError, match=r"seed: expected an integer below 2 \*\* 32, found 4294967296"):
        calibrate(model, [Example(0, "w1")], [], seed=2**32)


def _model() -> HyperAdapterModel:
    return HyperAdapterModel(tiny_backbone("bert"), TASKS, ModelConfig(adapter_dim=4))


def _writing_model(kind: str, tasks: list[Task]) -> HyperAdapterModel:
    model = HyperAdapterModel(
        tiny_backbone(kind), tasks, ModelConfig(adapter_dim=2), lengths=Lengths(input=32, target=5)
    )
    model.tokenizer = tiny_language_model_tokenizer() if kind == "gpt2" else tiny_tokenizer()
    return model


class Frame(pd.DataFrame):
    """A subclass of somebody else's, as geopandas has one."""


def test_a_subclass_of_a_data_frame_and_records_of_an_array_are_rows() -> None:
    rows = {"text": ["w1", "w2"], "task": ["mood", "mood"]}
    assert list(iterate_rows(Frame(rows))) == [{"text": text, "task": "mood"} for text in ("w1", "w2")]
    records = np.array([("mood", "w1"), ("mood", "w2")], dtype=[("task", "U9"), ("text", "U9")])
    assert list(iterate_rows(records)) == [{"task": "mood", "text": text} for text in ("w1", "w2")]


@pytest.mark.parametrize(
    "table",
    [
        pd.DataFrame([["a", "b"]], columns=["text", "text"]),
        pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
    ],
)
def test_a_table_with_two_columns_of_one_name_is_refused(table: Any) -> None:
    with pytest.raises(DataError, match="must be different from each other, found text, text"):
        iterate_rows(table)


def test_one_row_of_a_data_frame_is_not_taken_for_two_texts() -> None:
    with pytest.raises(DataError, match="one row of a DataFrame; put it in a list"):
        iterate_rows(pd.DataFrame({"text": ["w1"], "task": ["mood"]}).iloc[0])
    with pytest.raises(DataError, match="found memoryview"):
        iterate_rows(memoryview(b"w1"))


def test_decimals_of_any_size_are_plain_values() -> None:
    assert plain(Decimal("3.0")) == 3
    assert plain(Decimal("1e400")) == float("inf")
    assert plain(Decimal("sNaN")) != plain(Decimal("sNaN"))  # NaN, which equals nothing


def _write_labels(path: Path, labels: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": f"w{row}", "label": label}) + "\n" for row, label in enumerate(labels)))
