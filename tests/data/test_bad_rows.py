"""Rows that cannot be read are named by file and line, or skipped, counted and reported."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_backbone, tiny_tokenizer

from hyperadapters.config import DataConfig, ModelConfig, Source, Task, TaskEntry
from hyperadapters.data.bad_rows import BadRows
from hyperadapters.data.loading import load_task
from hyperadapters.data.sources import read_file
from hyperadapters.errors import DataError
from hyperadapters.inference.predict_files import predict_file
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel

GOOD = [{"text": f"w{row}", "label": ("no", "yes")[row % 2]} for row in range(6)]
BAD_LINES = (
    "{",
    "[1, 2]",
    '{"text": "w1"}',
    '{"label": "no"}',
    '{"text": 5, "label": "no"}',
    '{"text": "w1", "label": null}',
    '{"text": "\\ud800", "label": "no"}',
    '{"text": "w1", "text_pair": "w2", "label": "no"}',
    '{"text": "w1", "text": "w2", "label": "no"}',
    '{"text": "w1", "label": NaN}',
)


def entry(path: Path, **task: Any) -> TaskEntry:
    return TaskEntry(name="mood", source=Source(path=str(path)), **task)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


GOOD_LINES = [json.dumps(row) for row in GOOD]


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("labels", [(), ("no", "yes")])
def test_a_bad_row_is_named_or_skipped(
    line: str, labels: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "train.jsonl", *GOOD_LINES[:4], line, *GOOD_LINES[4:])
    with pytest.raises(DataError, match=r"train.jsonl, line 5: "):
        load_task(entry(path, labels=labels), 0, DataConfig(), 0)
    data = load_task(entry(path, labels=labels), 0, DataConfig(on_bad_row="skip"), 0)
    assert sorted(row.text for row in data.splits["train"]) == [row["text"] for row in GOOD]
    assert (data.num_skipped, data.task.labels) == (1, ("no", "yes"))
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(f"task 'mood': 1 row was skipped because it cannot be read; the first: {path}, line 5: ")


def test_a_label_that_the_task_does_not_have_is_a_bad_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", *GOOD_LINES, '{"text": "w9", "label": "perhaps"}')
    task = entry(path, labels=("no", "yes"))
    assert load_task(task, 0, DataConfig(on_bad_row="skip"), 0).num_skipped == 1


@pytest.mark.parametrize("row", ["w9", "w9,no,more", ",,,"])
def test_rows_of_a_table_with_another_number_of_cells_are_bad(row: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.csv", "text,label", "w1,no", row, "w2,yes")
    with pytest.raises(DataError, match=r"train.csv, line 3: expected 2 cells"):
        read_file(path)
    bad_rows = BadRows("skip")
    assert [found.values["text"] for found in read_file(path, bad_rows=bad_rows)] == ["w1", "w2"]
    assert (bad_rows.count, bad_rows.first.split(": ")[0]) == (1, f"{path}, line 3")


def test_a_row_of_several_lines_is_not_skipped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.csv", "text,label", 'w1,"no', "w2,yes", 'w3,no",yes', "w4,yes")
    with pytest.raises(DataError, match=r"line 4: expected 2 cells .* the row begins in line 2"):
        read_file(path, bad_rows=BadRows("skip"))


def test_a_fault_of_the_whole_file_is_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "caf\xe9", "label": "no"}\n')
    with pytest.raises(DataError, match=r"line 1: not UTF-8"):
        read_file(path, bad_rows=BadRows("skip"))


def test_a_split_without_a_readable_row_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", '{"texts": "w1", "label": "no"}', '{"texts": "w2", "label": "yes"}')
    with pytest.raises(DataError, match=r"task 'mood': none of its train rows can be read; the first: .*line 1: "):
        load_task(entry(path), 0, DataConfig(on_bad_row="skip"), 0)


def test_another_choice_is_refused() -> None:
    with pytest.raises(DataError, match=r"on_bad_row: .*'ignore'"):
        BadRows("ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_bad_row"):
        DataConfig(on_bad_row="ignore")  # type: ignore[arg-type]


def model() -> HyperAdapterModel:
    torch.manual_seed(0)
    found = HyperAdapterModel(
        tiny_backbone("bert"), [Task.classification("mood", ["no", "yes"])], ModelConfig(adapter_dim=4)
    )
    found.tokenizer = tiny_tokenizer()
    return found.eval()


def test_a_file_without_a_readable_row_says_why(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", '{"texts": "w1"}', "{")
    with pytest.raises(DataError, match=r"expected at least one row, found none; rows that were skipped: 2, .*line 1"):
        predict_file(Predictor(model()), source, None, tmp_path / "out.jsonl", on_bad_row="skip")
    with pytest.raises(DataError, match=r"in the train data, found none; rows that were skipped: 1, .*line 1: "):
        load_task(entry(write_lines(tmp_path / "a.jsonl", "{")), 0, DataConfig(on_bad_row="skip"), 0)


def test_rows_that_the_asked_tasks_do_not_read_are_skipped(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", '{"text": "w1"}', '{"text": "w1", "text_pair": "w2"}')
    predict_file(Predictor(model()), source, None, tmp_path / "out.jsonl", tasks=["mood"], on_bad_row="skip")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_predictions_omit_bad_rows_and_keep_the_order(
    ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"text": f"w{row}", "id": row}) for row in range(8)]
    source = write_lines(
        tmp_path / "in.jsonl",
        *lines[:3],
        "{",
        *lines[3:6],
        '{"text": null}',
        '{"text": "w1", "task": "moood"}',
        *lines[6:],
    )
    predictor, target = Predictor(model(), batch_size=2), tmp_path / f"out.{ending}"
    with pytest.raises(DataError, match=r"in.jsonl, line 4: "):
        predict_file(predictor, source, None, target)
    assert not target.exists()
    predict_file(predictor, source, None, target, on_bad_row="skip")
    expected = tmp_path / f"expected.{ending}"
    predict_file(predictor, write_lines(tmp_path / "good.jsonl", *lines), None, expected)
    assert target.read_text() == expected.read_text()
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(
        f"{source}: 3 rows were skipped because they cannot be read; the first: {source}, line 4: "
    )
