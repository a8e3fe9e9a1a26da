"""Rows from files and data sets: what is read, and how a fault names its file and line."""

from __future__ import annotations

import csv
import json
import re
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hyperadapters.config import DataConfig, Source, Split, TaskEntry
from hyperadapters.data.examples import TaskData
from hyperadapters.data.loading import load_task
from hyperadapters.data.sources import Row, read_file, read_splits
from hyperadapters.errors import DataError


def read_split(source: Source, split: Split) -> list[Row] | None:
    return read_splits(source).get(split)


GOOD = [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(path: Path | dict[str, str], source: dict[str, Any] | None = None, **settings: Any) -> TaskData:
    where = {"path": str(path) if isinstance(path, Path) else path, **(source or {})}
    return load_task(TaskEntry(name="mood", source=Source(**where), **settings), 0, DataConfig(), seed=0)


def values(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_file(path)]


# Files


def test_json_lines_are_read_and_empty_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ä", "label": 1}\n\n  \r\n{"text": "b"}', encoding="utf-8")
    assert values(path) == [{"text": "ä", "label": 1}, {"text": "b"}]
    assert [row.place for row in read_file(path)] == [f"{path}, line 1", f"{path}, line 4"]


def test_line_separators_inside_a_json_text_do_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n{"text": "b"}\n', encoding="utf-8")
    assert values(path) == [{"text": "one\u2028two\x85three"}, {"text": "b"}]


def test_csv_is_read_with_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a, ""b""",no\r\n\nc,yes\n', encoding="utf-8")
    assert values(path) == [{"text": 'a, "b"', "label": "no"}, {"text": "c", "label": "yes"}]


def test_csv_row_after_quoted_newlines_has_its_line_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one\ntwo\nthree",no\nc,yes\n', encoding="utf-8")
    rows = read_file(path)
    assert rows[0].values["text"] == "one\ntwo\nthree"
    assert rows[1].place == f"{path}, line 5"


def test_tsv_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\na, b\tno\n", encoding="utf-8")
    assert values(path) == [{"text": "a, b", "label": "no"}]


def test_parquet_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a", "label": 0}, {"text": "b", "label": None}])
    assert values(path) == [{"text": "a", "label": 0}, {"text": "b", "label": None}]
    assert [row.place for row in read_file(path)] == [f"{path}, row 1", f"{path}, row 2"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_upper_case_ending_is_understood(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"A.{ending.upper()}"
    if ending == "parquet":
        write_parquet(path, [{"text": "a"}])
    else:
        path.write_text('{"text": "a"}\n' if ending == "jsonl" else "text\na\n")
    assert values(path) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("ending", "content"), [("jsonl", '{"text": "a"}\n'), ("csv", "text\na\n"), ("tsv", "text\na\n")]
)
def test_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, ending: str, content: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(content, encoding="utf-8-sig")
    assert values(path) == [{"text": "a"}]


def test_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file\. Did you mean '.*train\.jsonl'\?"):
        read_file(tmp_path / "trian.jsonl")


def test_missing_folder_is_reported_as_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone/a\.jsonl: no such file\.$"):
        read_file(tmp_path / "gone" / "a.jsonl")


def test_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"unknown type '\.xlsx'; expected one of \.jsonl, \.csv, \.tsv, \.parquet"):
        read_file(path)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_invalid_utf8_is_reported_with_its_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"text\nok\n\xe4\nok\n")
    with pytest.raises(DataError, match=rf"a\.{ending}, line 3: not UTF-8: .*; save the file as UTF-8"):
        read_file(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "expected a JSON object on each line"),
        ("{'text': 'a'}", "expected a JSON object on each line"),
        ("[" * 100_000, "expected a JSON object on each line"),
        ('{"label": ' + "1" * 5000 + "}", "expected a JSON object on each line"),
        ('["a", "no"]', "expected a JSON object, found list"),
        ('"a"', "expected a JSON object, found str"),
        ("null", "expected a JSON object, found NoneType"),
    ],
    ids=["truncated", "python quotes", "endless nesting", "endless number", "list", "string", "null"],
)
def test_line_that_is_no_json_object_is_reported_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {message}"):
        read_file(path)


@pytest.mark.parametrize("row", ["a", "a,b,c", "a,b,"])
def test_wrong_number_of_cells_is_reported_with_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"x\ny",no\n{row}\n')
    advice = "; put texts that contain the delimiter into quotation marks" if row.count(",") > 1 else ""
    with pytest.raises(
        DataError, match=rf"line 4: expected 2 cells \(text, label\), found {row.count(',') + 1}{advice}"
    ):
        read_file(path)


@pytest.mark.parametrize("row", ['"a"b,no', '"a,no'])
def test_broken_quotes_are_reported_with_their_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\na,no\n{row}\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: "):
        read_file(path)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match=r"line 1: column names must be different from each other"):
        read_file(path)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        read_file(path)


# Sources


def test_pattern_with_split_finds_the_file_of_each_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    write_jsonl(tmp_path / "validation.jsonl", GOOD)
    with pytest.raises(DataError, match=r"test\.jsonl: no such file"):
        load(tmp_path / "{split}.jsonl")
    write_jsonl(tmp_path / "test.jsonl", GOOD[:1])
    found = load(tmp_path / "{split}.jsonl")
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 2, "validation": 2, "test": 1}


def test_file_for_each_split_is_read(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", GOOD), write_jsonl(tmp_path / "b.jsonl", GOOD[1:])
    found = load({"train": str(first), "validation": str(second)})
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 2, "validation": 1}


def test_file_that_a_split_names_must_exist(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        load({"train": str(first), "test": str(tmp_path / "gone.jsonl")})


def test_training_file_of_a_pattern_must_exist(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", GOOD)
    with pytest.raises(DataError, match=r"train\.jsonl: no such file"):
        load(tmp_path / "{split}.jsonl")


def test_source_without_training_rows_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match="task 'mood': found no training rows; its source must have a train split"):
        load({"test": str(path)})


@pytest.mark.parametrize(
    ("ending", "content"), [("jsonl", ""), ("jsonl", "\n\n"), ("csv", ""), ("csv", "text,label\n")]
)
def test_file_without_rows_is_refused(tmp_path: Path, ending: str, content: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"a\.{ending}: expected at least one row in the train data, found none"):
        load(path)


def test_columns_are_renamed(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": "x", "is_good": label} for q, label in (("a", "no"), ("b", "yes"))]
    columns = {"text": "question", "text_pair": "answer", "label": "is_good"}
    found = load(write_jsonl(tmp_path / "a.jsonl", rows), {"columns": columns}, fields=("text", "text_pair"))
    assert sorted((e.text, e.text_pair, e.target) for e in found.splits["train"]) == [("a", "x", 0), ("b", "x", 1)]


def test_columns_can_change_places(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "text_pair": "b"}])
    rows = read_split(Source(path=str(path), columns={"text": "text_pair", "text_pair": "text"}), "train")
    assert rows is not None
    assert rows[0].values == {"text": "b", "text_pair": "a"}


def test_missing_column_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"sentence": "a", "label": "no"}])
    expected = "line 1: no column 'sentnce' (for text). Did you mean 'sentence'? Found: sentence, label"
    with pytest.raises(DataError, match=re.escape(expected)):
        load(path, {"columns": {"text": "sentnce"}})


def test_label_names_replace_what_is_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    found = load(path, {"label_names": {"0": "bad", "1": "good"}})
    assert found.task.labels == ("bad", "good")


def test_label_names_replace_true_and_false_as_json_writes_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": False}, {"text": "b", "label": True}])
    found = load(path, {"label_names": {"false": "bad", "true": "good"}})
    assert found.task.labels == ("bad", "good")


def test_label_without_a_name_keeps_its_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "0"}, {"text": "b", "label": "other"}])
    assert load(path, {"label_names": {"0": "bad"}}).task.labels == ("bad", "other")


def test_unknown_demo_task_is_named_with_the_nearest_one() -> None:
    with pytest.raises(DataError, match=r"Unknown demo task 'message_spm'\. Did you mean 'message_spam'\?"):
        read_split(Source(demo="message_spm"), "train")


def test_demo_task_has_three_splits() -> None:
    splits = ("train", "validation", "test")
    assert all(read_split(Source(demo="message_spam"), split) for split in splits)


# Data sets


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads, with five training rows, four test rows, and named classes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_data_set(tmp_path / "reviews" / "train.parquet", [0, 1, 0, 1, 1])
    save_data_set(tmp_path / "reviews" / "test.parquet", [1, 0, 1, -1])
    return tmp_path / "reviews"


def save_data_set(path: Path, labels: list[int | None]) -> None:
    path.parent.mkdir(exist_ok=True)
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": [f"w{number}" for number in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features).to_parquet(path)


def test_data_set_is_read_with_the_names_of_its_classes(data_set: Path) -> None:
    rows = read_split(Source(dataset=str(data_set)), "train")
    assert rows is not None
    assert [row.values["label"] for row in rows] == ["bad", "good", "bad", "good", "good"]
    assert rows[2].place == f"data set {data_set}, train row 3"


def test_split_that_a_data_set_lacks_is_left_out(data_set: Path) -> None:
    assert read_split(Source(dataset=str(data_set)), "validation") is None


def test_splits_may_be_slices(data_set: Path) -> None:
    source = Source(
        dataset=str(data_set), splits={"train": "train[:3]", "validation": "train[3:]", "test": "test[:50%]"}
    )
    found = load_task(TaskEntry(name="mood", source=source), 0, DataConfig(), seed=0)
    assert {split: {row.text for row in rows} for split, rows in found.splits.items()} == {
        "train": {"w0", "w1", "w2"},
        "validation": {"w3", "w4"},
        "test": {"w0", "w1"},
    }


def test_split_that_is_not_listed_is_left_out(data_set: Path) -> None:
    assert read_split(Source(dataset=str(data_set), splits={"train": "train"}), "test") is None


def test_unlabelled_row_of_a_data_set_is_reported(data_set: Path) -> None:
    entry = TaskEntry(name="mood", source=Source(dataset=str(data_set)))
    with pytest.raises(DataError, match="test row 4: expected a label, found None"):
        load_task(entry, 0, DataConfig(), seed=0)


def test_row_of_a_data_set_whose_class_is_null_is_reported(data_set: Path) -> None:
    save_data_set(data_set.parent / "nulls" / "train.parquet", [0, None, 1])
    entry = TaskEntry(name="mood", source=Source(dataset=str(data_set.parent / "nulls")))
    with pytest.raises(DataError, match="train row 2: expected a label, found None"):
        load_task(entry, 0, DataConfig(), seed=0)


def test_unknown_split_of_a_data_set_is_reported(data_set: Path) -> None:
    with pytest.raises(DataError, match=r"reviews: cannot be loaded: Unknown split \"trian\""):
        read_split(Source(dataset=str(data_set), splits={"train": "trian"}), "train")


def test_empty_slice_of_a_data_set_is_refused(data_set: Path) -> None:
    with pytest.raises(DataError, match=r"reviews: cannot be loaded: .*corresponds to no data"):
        read_split(Source(dataset=str(data_set), splits={"train": "train[:0]"}), "train")


@pytest.mark.usefixtures("data_set")
def test_data_set_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: cannot be loaded: FileNotFoundError"):
        read_split(Source(dataset=str(tmp_path / "gone")), "train")


def test_unknown_configuration_of_a_data_set_is_reported(data_set: Path) -> None:
    with pytest.raises(DataError, match=r"reviews \(sst2\): cannot be loaded: "):
        read_split(Source(dataset=str(data_set), subset="sst2"), "train")


# Rows


def test_labels_are_found_in_the_training_rows_and_sorted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in ("b", 2, True, "a")])
    assert load(path).task.labels == ("2", "a", "b", "true")


def test_labels_of_the_task_keep_their_order(tmp_path: Path) -> None:
    found = load(write_jsonl(tmp_path / "a.jsonl", GOOD), labels=("yes", "no"))
    assert {example.text: example.target for example in found.splits["train"]} == {"a": 1, "b": 0}


@pytest.mark.parametrize("value", [3, None, 1.5, ["a"], True])
def test_text_that_is_no_string_is_reported(tmp_path: Path, value: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, {"text": value, "label": "no"}])
    expected = f"a.jsonl, line 3: expected a string in 'text', found {value!r}"
    with pytest.raises(DataError, match=re.escape(expected)):
        load(path)


def test_text_that_is_no_unicode_is_reported(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, {"text": "half \ud83d", "label": "no"}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: 'text' is not valid Unicode"):
        load(path)


def test_missing_second_text_of_a_pair_is_reported(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no column 'text_pair'. Did you mean 'text'\? Found: "):
        load(path, fields=("text", "text_pair"))


def test_unknown_label_is_reported_with_file_line_and_nearest_label(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, {"text": "c", "label": "yess"}])
    expected = "a.jsonl, line 3: unknown label 'yess' of task 'mood'. Did you mean 'yes'? Known: no, yes"
    with pytest.raises(DataError, match=re.escape(expected)):
        load(path, labels=("no", "yes"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_label_that_training_never_shows_is_refused_elsewhere(tmp_path: Path, split: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", GOOD)
    wrong = write_jsonl(tmp_path / f"{split}.jsonl", [{"text": "c", "label": "maybe"}])
    with pytest.raises(DataError, match=rf"{split}\.jsonl, line 1: unknown label 'maybe'"):
        load({"train": str(tmp_path / "train.jsonl"), split: str(wrong)})


def test_label_that_is_declared_but_never_occurs_in_training_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"task 'mood': label\(s\) maybe, never never occur in the training rows"):
        load(path, labels=("no", "yes", "maybe", "never"))


def test_single_label_in_training_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD[:1] * 3)
    with pytest.raises(DataError, match=r"expected at least two labels in the training rows, found \['no'\]"):
        load(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "c", "label": None}, "expected a label, found None"),
        ({"text": "c", "lable": "no"}, r"no column 'label'\. Did you mean 'lable'\? Found: text, lable"),
    ],
    ids=["null", "misspelt"],
)
def test_row_without_a_label_is_reported(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, row])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {message}"):
        load(path)


def test_folder_in_place_of_a_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file, found a folder"):
        load(tmp_path)


def test_name_that_is_too_long_for_a_file_is_reported(tmp_path: Path) -> None:
    for name in ("n" * 300 + ".csv", "n" * 300 + "/a.csv", "a\0b.csv"):
        with pytest.raises(DataError, match=r"\.csv: no such file"):
            read_file(tmp_path / name)


def test_json_line_of_any_depth_is_reported(tmp_path: Path) -> None:
    for depth in (100, 900, 100_000):
        (tmp_path / "a.jsonl").write_text('{"text": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(
            DataError, match=r"line 1: expected a JSON object on each line: expected at most 100 levels"
        ):
            read_file(tmp_path / "a.jsonl")


def test_label_of_thousands_of_digits_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na," + "9" * 5000 + "\n")
    with pytest.raises(DataError, match=r"line 2: unknown label '9+' of task 'mood'"):
        load(tmp_path / "a.csv", labels=["no", "yes"])


def test_target_beyond_float32_is_reported(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "c", "label": 1e39}])
    with pytest.raises(DataError, match="expected a finite number as target"):
        load(path, kind="regression")


@pytest.mark.parametrize("label", ["", 1.5, ["no"], {"no": 1}])
def test_label_that_is_no_name_or_whole_number_is_reported(tmp_path: Path, label: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, {"text": "c", "label": label}])
    with pytest.raises(DataError, match=re.escape(f"line 3: expected a label, found {label!r}")):
        load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("f1",)}, "f1 requires two labels, found 3"),
        ({"verbalizer": {"no": "0", "yes": "1"}}, "verbalizer"),
    ],
)
def test_labels_found_in_the_data_must_fit_the_task(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, {"text": "c", "label": "maybe"}])
    with pytest.raises(DataError, match=message):
        load(path, **settings)


def test_numbers_are_read_from_numbers_and_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in (1, 2.5, "-3e1")])
    assert sorted(e.target for e in load(path, kind="regression").splits["train"]) == [-30.0, 1.0, 2.5]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "[NaN]", '{"a": -1e999}'])
def test_json_lines_with_a_number_that_is_not_finite_are_refused_in_every_column(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "other": 1.5e3}\n{"text": "b", "other": ' + number + "}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*expected a finite number, found .*; write null where"):
        read_file(path)


LARGE = "12345678901234567890"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([Decimal("1.00"), Decimal("2.00")], ("1", "2")),
        ([Decimal(LARGE), Decimal(LARGE) + 1], (LARGE, LARGE[:-1] + "1")),
        ([True, False], ("false", "true")),
        (np.array([1, 2], dtype=np.float16), ("1", "2")),
        (np.array([2**64 - 1, 1], dtype=np.uint64), ("1", "18446744073709551615")),
        (pa.array(["b", "a"]).dictionary_encode(), ("a", "b")),
        (pa.array(["b", "a"], pa.large_string()), ("a", "b")),
    ],
)
def test_labels_of_every_type_of_a_column(tmp_path: Path, labels: Any, names: tuple[str, ...]) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet").task.labels == names


@pytest.mark.parametrize("ending", ["tsv", "csv"])
def test_labels_of_text_files_are_read_as_they_are_written(tmp_path: Path, ending: str) -> None:
    path, mark = tmp_path / f"rows.{ending}", {"tsv": "\t", "csv": ","}[ending]
    cells = ["1.00", "001", "1", "2024-01-02", "NaN", " x ", "true", "True"]
    path.write_text(f"text{mark}label\n" + "".join(f"a{mark}{cell}\n" for cell in cells))
    assert load(path).task.labels == ("001", "1", "1.00", "2024-01-02", "NaN", "True", "true", "x")


@pytest.mark.parametrize("kind", ["classification", "regression", "text-to-text"])
@pytest.mark.parametrize(
    "value",
    [b"a", datetime(2024, 1, 2), date(2024, 1, 2), timedelta(1), ["a"], {"a": 1}, None],
    ids=["binary", "timestamp", "date", "duration", "list", "struct", "null"],
)
def test_a_column_that_holds_no_labels_is_refused_with_its_row(tmp_path: Path, kind: str, value: Any) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [value, value]}), path)
    found = re.escape("rows.parquet, row 1: expected a ") + r"(label|number as target|string as target), found "
    with pytest.raises(DataError, match=found + re.escape(repr(value))):
        load(path, kind=kind)


@pytest.mark.parametrize("label", ['"nan"', '"inf"', '"-Infinity"', '"1e999"'])
def test_target_that_is_not_finite_is_reported(tmp_path: Path, label: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": ' + label + "}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: expected a finite number as target, found"):
        load(path, kind="regression")


@pytest.mark.parametrize("label", ["many", "", None, True, [1]])
def test_target_that_is_no_number_is_reported(tmp_path: Path, label: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": label}])
    with pytest.raises(DataError, match=re.escape(f"a.jsonl, line 2: expected a number as target, found {label!r}")):
        load(path, kind="regression")


def test_target_that_no_float_can_hold_is_reported(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 10**400}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: expected a (finite )?number as target"):
        load(path, kind="regression")


@pytest.mark.parametrize("label", [None, 3, ["a"]])
def test_target_that_is_no_text_is_reported(tmp_path: Path, label: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}, {"text": "b", "label": label}])
    with pytest.raises(DataError, match=re.escape(f"a.jsonl, line 2: expected a string as target, found {label!r}")):
        load(path, kind="text-to-text")


# Rows in, rows out


def texts_of(path: Path, content: str) -> list[tuple[Any, ...]]:
    path.write_bytes(content.encode())
    return [tuple(row.values.values()) for row in read_file(path)]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('"Hello, she said\tpos\nplain\tneg\nand left"\tneg\n', [('"Hello, she said', "pos"), ("plain", "neg"),
                                                                 ('and left"', "neg")]),
        ('5" pipe\tpos\n"\tneg\n', [('5" pipe', "pos"), ('"', "neg")]),
        ('"all of it"\tpos\n', [('"all of it"', "pos")]),
        ('"say ""hi"""\tpos\n', [('say "hi"', "pos")]),
        ('"one\ntwo"\tpos\n"a\tb"\tneg\n', [("one\ntwo", "pos"), ("a\tb", "neg")]),
        ('a\rb\tpos\r\n\n\tneg', [("a\rb", "pos"), ("", "neg")]),
        ('a\u2028b\x00\tpos\n', [("a\u2028b\x00", "pos")]),
    ],
)  # fmt: skip
def test_rows_of_a_tsv_stay_apart(tmp_path: Path, content: str, rows: list[Any]) -> None:
    assert texts_of(tmp_path / "a.tsv", "text\tlabel\n" + content) == rows


def test_tsv_with_quoted_column_names_is_read_as_a_csv_writer_wrote_it(tmp_path: Path) -> None:
    rows = [("Hello", "pos"), ("a\tb\nc", "neg")]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    assert [tuple(row.values.values()) for row in read_file(tmp_path / "a.tsv")] == rows


def test_reading_of_a_doubtful_quotation_mark_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    doubtful = 'text\tlabel\nplain\tneg\n"Hello\tpos\nand left"\tneg\n'
    assert len(texts_of(tmp_path / "a.tsv", doubtful)) == 3
    assert "a.tsv, line 3: a cell begins with a quotation mark, which is read as part of the text" in caplog.text
    assert len(texts_of(tmp_path / "a.csv", doubtful.replace("\t", ","))) == 2
    assert "a.csv, line 3: a quotation mark opens a cell that ends in line 4" in caplog.text


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_quotation_mark_that_is_never_closed_is_named_with_its_line(tmp_path: Path, ending: str) -> None:
    content = 'text,label\nw1,no\n"w2\nw3,no\n'.replace(",", "\t" if ending == "tsv" else ",")
    with pytest.raises(DataError, match=rf"a\.{ending}, line 3: a quotation mark .* it is never closed"):
        texts_of(tmp_path / f"a.{ending}", content)


def test_quotation_mark_that_closes_in_another_row_is_named_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 2: a quotation mark .* in line 4"):
        texts_of(tmp_path / "a.csv", 'text,label\n"Hello,no\nw1,no\nand "left,no\n')
    with pytest.raises(
        DataError, match=r"line 3: expected 2 cells .*; the row begins in line 2, which contains a quotation"
    ):
        texts_of(tmp_path / "a.csv", 'text,label\n"Hello,no\nleft",a,b\n')


def test_wrong_line_of_a_tsv_names_a_quotation_mark_before_it(tmp_path: Path) -> None:
    expected = r"line 4: expected 2 cells \(text, label\), found 1; line 3 has a cell that begins with a quotation mark"
    with pytest.raises(DataError, match=expected):
        texts_of(tmp_path / "a.tsv", 'text\tlabel\nw1\tw2\nw3\t"w4\nw5"\n')


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_blank_line_in_place_of_column_names_is_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError, match="line 1: expected the names of the columns, found a blank line"):
        texts_of(tmp_path / f"a.{ending}", "\ntext\na\n")


def test_carriage_return_in_a_csv_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: a carriage return inside the line"):
        texts_of(tmp_path / "a.csv", "text\na\rb\n")
    with pytest.raises(DataError, match="line 1: found a carriage return in the line"):
        texts_of(tmp_path / "a.tsv", "text\ra\rb\r")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_blank_line_of_a_single_column_is_an_empty_text(tmp_path: Path, ending: str) -> None:
    assert texts_of(tmp_path / f"a.{ending}", "text\na\n\nb\n\n") == [("a",), ("",), ("b",), ("",)]


@pytest.mark.parametrize("text", ['{"text": "a", "text": "b"}', '{"text": "a", "meta": {"text": 1, "text": 1}}'])
def test_json_key_that_occurs_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"line 1: .*the key 'text' occurs 2 times in one object; remove all but one"):
        texts_of(tmp_path / "a.jsonl", text)


def test_column_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: column 1 has no name; name it or remove it \(pandas"):
        texts_of(tmp_path / "a.csv", ",text\n0,a\n")


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column names must be different from each other"):
        read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize("dictionary", [True, False])
def test_parquet_text_that_is_not_utf8_is_named_with_its_row(tmp_path: Path, dictionary: bool) -> None:
    good = pa.array([b"ok"] * 1500 + [b"\xff"])
    data = pa.Array.from_buffers(pa.string(), len(good), good.buffers())
    table = pa.table({"text": data.dictionary_encode() if dictionary else data})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1501: 'text' is not UTF-8"):
        read_file(tmp_path / "a.parquet")


def test_parquet_column_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a", "name": "b"}])
    path.write_bytes(path.read_bytes().replace(b"name", b"\xff\xff\xff\xff"))
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        read_file(path)


@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.timestamp("us"), pa.date32(), pa.duration("ms")])
def test_parquet_value_that_python_cannot_represent_is_named_with_its_row(tmp_path: Path, kind: pa.DataType) -> None:
    bits = pa.array([2**30], pa.int32()) if kind == pa.date32() else pa.array([2**62])
    pq.write_table(pa.table({"text": pa.concat_arrays([pa.nulls(1, kind), bits.view(kind)])}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'text' cannot be read: "):
        read_file(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_each_arrow_type_of_text_is_a_text(tmp_path: Path, kind: pa.DataType) -> None:
    array = pa.array(["a", None]).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(["a", None], kind)
    try:
        pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    except pa.ArrowNotImplementedError:
        pytest.skip("this version of PyArrow does not write the type")
    assert values(tmp_path / "a.parquet") == [{"text": "a"}, {"text": None}]


def test_limit_of_a_cell_fits_the_c_long_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = csv.field_size_limit

    def limit(value: int) -> int:
        if value > 2**31 - 1:
            raise OverflowError("Python int too large to convert to C long")
        return original(value)

    monkeypatch.setattr(csv, "field_size_limit", limit)
    assert texts_of(tmp_path / "a.csv", "text\n" + "a" * 200_000 + "\n") == [("a" * 200_000,)]


@pytest.mark.parametrize(("ending", "mark"), [("csv", ";"), ("csv", "\t"), ("csv", "|"), ("tsv", ","), ("tsv", ";")])
def test_other_delimiter_is_named_and_can_be_set(tmp_path: Path, ending: str, mark: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(f"text{mark}label\na{mark}no\nb{mark}yes\n")
    with pytest.raises(DataError, match=re.escape(f"seems to be delimited by {mark!r}; set delimiter: {mark!r}")):
        read_file(path)
    assert load(path, {"delimiter": mark}).task.labels == ("no", "yes")


def test_csv_folder_read_as_a_data_set_keeps_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "train.csv").write_text("text,label\nNA,001\n1.0,1\n,true\n")
    rows = read_split(Source(dataset=str(tmp_path / "codes")), "train")
    assert rows is not None
    assert [tuple(row.values.values()) for row in rows] == [("NA", "001"), ("1.0", "1"), ("", "true")]


def test_label_names_know_whole_numbers_of_a_column_with_nulls(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0.0, 1.0]}), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", {"label_names": {"0": "bad", "1": "good"}}).task.labels == ("bad", "good")


def test_label_name_that_never_occurs_is_refused_with_the_nearest_label(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", GOOD)
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "c", "label": "nope"}])
    names = {"no": "bad", "yse": "good"}
    with pytest.raises(DataError, match=r"label_names: Unknown label 'yse'\. Did you mean 'yes'\? Known: no, yes\."):
        load(train, {"label_names": names})
    found = load({"train": str(train), "test": str(test)}, {"label_names": {"nope": "no"}})  # it occurs in test only
    assert found.task.labels == ("no", "yes")
