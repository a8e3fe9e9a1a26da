"""Which files of a folder hold which task."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperadapters.data.task_files import find_tasks, infer_schemas, make_entry
from hyperadapters.errors import DataError, RecipeError

CSV = "text,label\ngood film,yes\nbad film,no\n"


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CSV)


def test_a_file_is_a_task_with_its_name(tmp_path: Path) -> None:
    assert find_tasks(tmp_path / "mood.csv") == {"mood": {"train": tmp_path / "mood.csv"}}
    assert find_tasks(tmp_path / "mood" / "train.csv") == {"mood": {"train": tmp_path / "mood" / "train.csv"}}


def test_a_folder_with_splits_is_a_task(tmp_path: Path) -> None:
    write(tmp_path, "mood/train.csv", "mood/dev.csv", "mood/Test.csv", "mood/README.md")
    folder = tmp_path / "mood"
    files = {"train": folder / "train.csv", "validation": folder / "dev.csv", "test": folder / "Test.csv"}
    assert find_tasks(folder) == {"mood": files}


def test_a_folder_of_tasks_has_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "a/train.csv", "a/test.csv", "b.csv", "notes/notes.txt", "tests_only/test.csv")
    found = find_tasks(tmp_path)
    assert list(found) == ["a", "b"]
    assert found["a"].keys() == {"train", "test"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes.txt"], "found no data; expected files ending in .jsonl"),
        (["train.csv", "train.tsv"], "two files could be the train data: train.csv and train.tsv"),
        (["a/train.csv", "a.csv"], "two tasks have the name 'a'"),
    ],
)
def test_what_is_unclear_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    write(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_tasks(tmp_path)


def test_an_entry_reads_the_guessed_columns(tmp_path: Path) -> None:
    (tmp_path / "mood.csv").write_text("utterance,intent\n" + "a film to see,yes\na dull long film,no\n" * 3)
    files = find_tasks(tmp_path / "mood.csv")["mood"]
    entry = make_entry("mood", files, infer_schemas({"mood": files})["mood"])
    assert entry.source.columns == {"text": "utterance", "label": "intent"}
    assert (entry.kind, entry.fields) == ("classification", ("text",))


def test_a_file_name_that_cannot_be_a_task_is_refused(tmp_path: Path) -> None:
    write(tmp_path, " .csv")
    files = find_tasks(tmp_path / " .csv")
    with pytest.raises(RecipeError, match="expected 1 to 100 characters"):
        make_entry(" ", files[" "], infer_schemas(files)[" "])
