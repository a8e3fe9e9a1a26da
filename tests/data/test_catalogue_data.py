"""The catalogue reads data with the columns that the repositories of the Hub have, which are written here to files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import datasets
import pytest
from hub_repositories import BOOL, NLI, RTE, SCHEMAS, Classes, Schema, has_label, row_of, write_repository

from hyperadapters.config import DataConfig, TaskEntry, parse
from hyperadapters.config.catalogue import catalogue
from hyperadapters.data.examples import TaskData
from hyperadapters.data.loading import load_task
from hyperadapters.data.targets import target_text
from hyperadapters.errors import DataError

ROWS = 20

T5 = {
    "glue/cola": ("cola sentence: {sentence}", ("unacceptable", "acceptable")),
    "glue/sst2": ("sst2 sentence: {sentence}", ("negative", "positive")),
    "glue/mrpc": ("mrpc sentence1: {sentence1} sentence2: {sentence2}", ("not_equivalent", "equivalent")),
    "glue/qqp": ("qqp question1: {question1} question2: {question2}", ("not_duplicate", "duplicate")),
    "glue/stsb": ("stsb sentence1: {sentence1} sentence2: {sentence2}", None),
    "glue/mnli": ("mnli hypothesis: {hypothesis} premise: {premise}", NLI),
    "glue/qnli": ("qnli question: {question} sentence: {sentence}", RTE),
    "glue/rte": ("rte sentence1: {sentence1} sentence2: {sentence2}", RTE),
    "glue/wnli": ("wnli sentence1: {sentence1} sentence2: {sentence2}", ("not_entailment", "entailment")),
    "super_glue/boolq": ("boolq passage: {passage} question: {question}", BOOL),
    "super_glue/cb": ("cb hypothesis: {hypothesis} premise: {premise}", ("entailment", "contradiction", "neutral")),
    "super_glue/copa": (
        "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
        ("choice1", "choice2"),
    ),
    "super_glue/multirc": ("multirc question: {question} answer: {answer} paragraph: {paragraph}", BOOL),
    "super_glue/record": ("record query: {query} entities: Ada, Bob, Cleo passage: {passage}", ("Bob",)),
    "super_glue/rte": ("rte hypothesis: {hypothesis} premise: {premise}", RTE),
    "super_glue/wic": ("wic sentence1: {sentence1} sentence2: {sentence2} word: {word}", BOOL),
}
"""Prompts and label words of T5 (Raffel et al. 2020, appendix D, and the preprocessor `glue` of its code).

The columns are in alphabetical order, but for MultiRC and WiC.
"""
RATED = ("1.6", "3.0", "4.2")
"""The numbers of STS-B in this file as T5 writes them, to the nearest fifth."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the repositories are, each under its name."""
    root = tmp_path_factory.mktemp("hub")
    for repository in SCHEMAS:
        write_repository(root, repository, ROWS)
    return root


@pytest.fixture(autouse=True)
def in_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "cache")
    monkeypatch.chdir(hub)


def schema_of(name: str) -> Schema | None:
    """The schema of an entry of the catalogue, if its data are written here."""
    source = catalogue()[name].values["source"]
    configurations = SCHEMAS.get(source.get("dataset"), {})
    return configurations.get(source.get("subset") or next(iter(configurations), ""))


@cache
def load(name: str) -> TaskData:
    """Load a task of the catalogue, with fewer rows held out than it has in the catalogue."""
    held_out = {split: dict(rows) for split, rows in catalogue()[name].values["source"].get("held_out", {}).items()}
    if "validation" in held_out:
        held_out["validation"]["size"] = 2
    return load_task(parse(TaskEntry, {"catalogue": name, "source": {"held_out": held_out}}), 0, DataConfig(), seed=0)


ALIKE = ("mrqa/triviaqa", "mrqa/searchqa", "mrqa/hotpotqa", "mrqa/naturalquestions")
"""Entries that differ from a loaded one in the value of a column only."""
LOADED = [name for name in catalogue() if schema_of(name) is not None and name not in ALIKE]


@pytest.mark.parametrize("name", LOADED)
def test_task_is_read_from_the_columns_and_splits_of_its_repository(name: str) -> None:
    schema, data = schema_of(name), load(name)
    assert schema is not None
    texts = {split: {(row.text, row.text_pair) for row in rows} for split, rows in data.splits.items()}
    assert texts.keys() == {"train", "validation", "test"}
    assert all(texts.values())
    assert not texts["train"] & texts["validation"]
    assert not (texts["train"] | texts["validation"]) & texts["test"]
    if data.task.labels:
        column = catalogue()[name].values["source"].get("columns", {}).get("label", "label")
        assert len(data.task.labels) == len(schema.label[column])
        assert {row.target for row in data.splits["train"]} == set(range(len(data.task.labels)))


@pytest.mark.parametrize("name", T5)
def test_prompts_and_label_words_are_those_of_t5(name: str) -> None:
    prompt, words = T5[name]
    schema, data = schema_of(name), load(name)
    assert schema is not None
    repository = catalogue()[name].values["source"]["dataset"]
    written = {
        prompt.format(**row_of(repository, schema, "train", number)): (words or RATED)[number % len(words or RATED)]
        for number in range(ROWS)
    }
    found = {
        (data.task.template or "").format(text=row.text, text_pair=row.text_pair): target_text(data.task, row.target)
        for row in data.splits["train"]
    }
    assert found
    assert found.items() <= written.items()


def test_subset_of_a_data_set_is_read_without_the_other_rows() -> None:
    assert {row.text for row in load("mrqa/newsqa").splits["test"]} == {
        f"question validation {n}" for n in (1, 7, 13, 19)
    }
    assert {row.target for row in load("mrqa/newsqa").splits["train"]} == {"right"}


def test_rows_without_a_label_are_left_out_of_snli() -> None:
    assert len(load("pairs/snli").splits["train"]) == sum(number % 7 != 0 for number in range(ROWS))


def test_large_tasks_hold_out_training_rows_and_small_ones_halve_their_validation_rows() -> None:
    sizes = {name: [len(rows) for rows in load(name).splits.values()] for name in ("glue/qnli", "glue/rte")}
    assert sizes == {"glue/qnli": [ROWS - 2, ROWS, 2], "glue/rte": [ROWS, ROWS // 2, ROWS // 2]}
    assert catalogue()["glue/qnli"].values["source"]["held_out"] == {"validation": {"from": "train", "size": 1000}}


def test_catalogue_task_reads_files_instead_if_the_recipe_gives_them(tmp_path: Path) -> None:
    rows = [{"premise": f"p{number}", "hypothesis": "h", "label": NLI[number % 3]} for number in range(9)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "mine.jsonl"), "held_out": {"test": {"size": 3}}}
    data = load_task(parse(TaskEntry, {"catalogue": "glue/mnli", "source": source}), 0, DataConfig(), seed=0)
    assert {split: len(found) for split, found in data.splits.items()} == {"train": 6, "test": 3}
    assert {row.text_pair for row in data.splits["train"]} == {"h"}


INDEXED = [
    name
    for name in LOADED
    if "labels" in catalogue()[name].values
    and any(isinstance(values, Classes) for values in getattr(schema_of(name), "label", {}).values())
]
"""Entries whose repositories have indices of classes, which a file that is exported from them has without the names."""


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
@pytest.mark.parametrize("name", INDEXED)
def test_indices_of_classes_in_an_exported_file_are_those_of_the_repository(
    name: str, ending: str, tmp_path: Path
) -> None:
    schema, repository = schema_of(name), catalogue()[name].values["source"]["dataset"]
    assert schema is not None
    rows = [row_of(repository, schema, schema.splits[0], number) for number in range(ROWS)]
    exported, path = datasets.Dataset.from_list(rows), tmp_path / f"train{ending}"
    exported.to_csv(path) if ending == ".csv" else exported.to_json(path)
    source = {"path": str(path), "held_out": {"test": {"size": 0.2}}}
    read = load_task(parse(TaskEntry, {"catalogue": name, "source": source}), 0, DataConfig(), seed=0)
    found, expected = (
        {(row.text, row.text_pair): row.target for rows in data.splits.values() for row in rows}
        for data in (read, load(name))
    )
    assert len(found) == sum(has_label(repository, schema.splits[0], number) for number in range(ROWS))
    assert found.items() <= expected.items()


def test_recipe_that_names_the_numbers_in_its_data_decides_what_they_are(tmp_path: Path) -> None:
    rows = [{"sentence": f"s{number}", "label": number % 2} for number in range(6)]
    (tmp_path / "sst2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "sst2.jsonl"), "label_names": {0: "positive", 1: "negative"}, "held_out": {}}
    data = load_task(parse(TaskEntry, {"catalogue": "glue/sst2", "source": source}), 0, DataConfig(), seed=0)
    assert {row.text: data.task.labels[int(str(row.target))] for row in data.splits["train"]} == {
        f"s{number}": ("positive", "negative")[number % 2] for number in range(6)
    }


def test_file_without_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sst2.jsonl").write_text('{"sentence": "s"}\n')
    source = {"path": str(tmp_path / "sst2.jsonl"), "held_out": {}}
    with pytest.raises(DataError, match="line 1: no column 'label'"):
        load_task(parse(TaskEntry, {"catalogue": "glue/sst2", "source": source}), 0, DataConfig(), seed=0)


def test_index_that_no_class_has_is_refused(tmp_path: Path) -> None:
    rows = [{"sentence": f"s{number}", "label": number} for number in range(3)]
    (tmp_path / "sst2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "sst2.jsonl"), "held_out": {}}
    with pytest.raises(DataError, match="line 3: unknown label '2' of task 'sst2'"):
        load_task(parse(TaskEntry, {"catalogue": "glue/sst2", "source": source}), 0, DataConfig(), seed=0)
