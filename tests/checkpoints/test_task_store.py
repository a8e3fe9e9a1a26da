"""Task stores: what was put in comes out bit for bit, whatever happens to the process or the files in between."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, lived_in, make_batch, make_model, tiny_tokenizer
from other_processes import start

from hyperadapters.checkpoints import task_store, task_store_files
from hyperadapters.checkpoints.task_store import TaskStore
from hyperadapters.checkpoints.task_store_files import TASK
from hyperadapters.config import Task
from hyperadapters.errors import CheckpointError, OutputError, TaskError
from hyperadapters.model.model import HyperAdapterModel

FILES = ("tasks.bin", "names.bin", "keys.bin", "owners.bin", "records.bin")


def _store(folder: Path, model: HyperAdapterModel) -> TaskStore:
    store = TaskStore.create(folder, model)
    store.append(model)
    return store


def _renamed(model: HyperAdapterModel, ending: str) -> HyperAdapterModel:
    for task in model.tasks:
        model.task_table.rename(task.name, task.name + ending)
    return model


def _outputs(model: HyperAdapterModel, kind: str, task: str) -> torch.Tensor:
    """Logits of a batch whose rows are all of one task, so that its shapes do not depend on the other tasks."""
    batch = make_batch(kind)
    batch["task_ids"] = torch.full_like(batch["task_ids"], model.task_id(task))
    labels = batch.pop("labels", None)
    if kind == "t5":
        batch["decoder_input_ids"] = labels.clamp(min=0)
    with torch.no_grad():
        logits: torch.Tensor = model(**batch).logits
    return logits


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("kind", "settings"), [("bert", {}), ("t5", {}), ("bert", {"form": "lora"})])
def test_stored_tasks_answer_bit_for_bit_like_those_of_the_model_they_came_from(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = lived_in(kind, own=("mood",), **settings)
    model.method.adapter_scales[0] = 0.3
    expected = {task.name: _outputs(model, kind, task.name) for task in model.tasks}
    definitions = {task.name: task for task in model.tasks}
    _store(tmp_path / "store", model)

    store = TaskStore.open(tmp_path / "store")
    for name in expected:
        store.load(model, [name])
        assert model.tasks == (definitions[name],)
        assert_same(_outputs(model, kind, name), expected[name])
    store.load(model, ["mood", "colour"])
    assert [task.name for task in model.tasks] == ["colour", "mood"]
    assert_same(_outputs(model, kind, "mood"), expected["mood"])


def test_a_task_has_the_same_state_after_it_was_stored(tmp_path: Path) -> None:
    model = lived_in("bert", centroids_per_task=2)
    model.task_table.set_heads([head.rounded() for head in model.heads.unpack()])
    expected = model.task_table.states()
    _store(tmp_path / "store", model).load(model, [task.name for task in model.tasks])
    for found, state in zip(model.task_table.states(), expected, strict=True):
        assert (found.task, found.threshold, found.adapter_scale) == (state.task, state.threshold, state.adapter_scale)
        for name in ("prototype", "centroids", "density"):
            assert_same(getattr(found, name), getattr(state, name))
        assert found.head is not None
        assert state.head is not None
        assert_same(found.head.weight, state.head.weight)
        assert found.head[2:5] == state.head[2:5]
        assert found.head.label_thresholds == state.head.label_thresholds
        assert (found.own_adapter is None) == (state.own_adapter is None)


def test_tasks_are_appended_and_the_earlier_values_stay_where_they_are(tmp_path: Path) -> None:
    model = lived_in("bert")
    _store(tmp_path / "store", model)
    before = _contents(tmp_path / "store")
    TaskStore.open(tmp_path / "store").append(_renamed(model, "2"), ["mood2", "size2"])

    store = TaskStore.open(tmp_path / "store")
    assert [task.name for task in store] == ["colour", "size", "mood", "size2", "mood2"]
    assert len(store) == 5
    assert "mood2" in store
    assert "colour2" not in store
    after = _contents(tmp_path / "store")
    assert all(after[name].startswith(before[name]) and len(after[name]) > len(before[name]) for name in FILES)


def test_an_open_store_sees_what_others_append_when_it_is_refreshed(tmp_path: Path) -> None:
    model = lived_in("bert")
    store = _store(tmp_path / "store", model)
    TaskStore.open(tmp_path / "store").append(_renamed(model, "2"))
    assert "mood2" not in store
    store.refresh()
    assert "mood2" in store


def test_a_task_of_the_same_name_is_refused_or_replaces_the_earlier_one(tmp_path: Path) -> None:
    model = lived_in("bert")
    store = _store(tmp_path / "store", model)
    before = _contents(tmp_path / "store")
    with pytest.raises(TaskError, match="already a task 'mood'; rename it, or replace"):
        store.append(model, ["mood"])
    assert _contents(tmp_path / "store") == before

    with torch.no_grad():
        model.method.prototypes.weight.neg_()
    expected = _outputs(model, "bert", "mood")
    store.append(model, ["mood"], replace=True)
    assert [task.name for task in store] == ["colour", "size", "mood"]
    TaskStore.open(tmp_path / "store").load(model, ["mood"])
    own = model.method.own_adapters
    assert_same(_outputs(model, "bert", "mood"), expected)
    assert len(own) == 1


def test_a_removed_task_is_not_found_any_more(tmp_path: Path) -> None:
    model = lived_in("bert")
    store = _store(tmp_path / "store", model)
    store.remove(["size"])
    store = TaskStore.open(tmp_path / "store")
    assert [task.name for task in store] == ["colour", "mood"]
    assert len(store) == 2
    with pytest.raises(TaskError, match=r"Unknown task 'size': it is none of the 2 tasks in the task store"):
        store.load(model, ["mood", "size"])
    store.append(model, ["size"])
    assert "size" in store


@pytest.mark.parametrize("settings", [{}, {"centroids_per_task": 2}])
def test_a_copy_has_the_present_tasks_and_nothing_of_earlier_ones(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_store, "COPIED_TASKS", 2)
    model = lived_in("bert", **settings)
    store = _store(tmp_path / "store", model)
    expected = _contents(tmp_path / "store")
    store.append(model, ["size"], replace=True)
    store.append(_renamed(model, "2"), ["mood2"])
    store.remove(["size", "mood2"])
    store.append(lived_in("bert", **settings), ["size"])

    copied = store.copy(tmp_path / "copy")
    assert [task.name for task in copied] == [task.name for task in store] == ["colour", "mood", "size"]
    assert copied.config.tasks == 3
    found = _contents(tmp_path / "copy")
    assert {name: len(content) for name, content in found.items() if name != "task_store.json"} == {
        name: len(content) for name, content in expected.items() if name != "task_store.json"
    }
    model = lived_in("bert", **settings)
    before = {task.name: _outputs(model, "bert", task.name) for task in model.tasks}
    copied.load(model, before)
    for name, output in before.items():
        assert_same(_outputs(model, "bert", name), output)


def test_a_damaged_store_is_not_copied(tmp_path: Path) -> None:
    store = _store(tmp_path / "store", lived_in("bert"))
    path = tmp_path / "store" / "records.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"records\.bin: task 2 has another checksum"):
        store.copy(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(OutputError, match="already exists"):
        store.copy(tmp_path / "store")


def test_models_with_other_shared_parts_are_refused(tmp_path: Path) -> None:
    model = lived_in("bert")
    store = _store(tmp_path / "store", model)
    with torch.no_grad():
        next(model.method.hypernetwork.parameters()).add_(1e-3)
    for change in (lambda: store.append(model, ["mood"], replace=True), lambda: store.load(model, ["mood"])):
        with pytest.raises(CheckpointError, match=r"shared parts have the digest .* trained apart or further"):
            change()
    other = make_model("bert", temperature=0.5)
    with pytest.raises(CheckpointError, match="for a model with other settings"):
        store.load(other, ["mood"])
    backbone = make_model("bert").detach()
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    changed = HyperAdapterModel(backbone, model.tasks, model.adapter_config)
    with pytest.raises(CheckpointError, match=r"for the backbone .* with fingerprint"):
        store.load(changed, ["mood"])


def test_names_are_data(tmp_path: Path) -> None:
    names = ["é" * 100, "\U0001f600", "{", '"', "'; drop table", "$(touch outside)", "%s", "..x", "null"]
    model = make_model("bert")
    for name in names:
        model.task_table.rename(model.tasks[0].name, name)
        if name == names[0]:
            store = TaskStore.create(tmp_path / "store", model)
        store.append(model, [name])
    store = TaskStore.open(tmp_path / "store")
    assert [task.name for task in store] == names
    for name in names:
        store.load(model, [name])
        assert model.tasks[0].name == name
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_names_with_the_same_hash_are_different_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_store, "name_hash", len)
    model = make_model("bert")
    model.task_table.rename("colour", "doom")
    store = _store(tmp_path / "store", model)
    assert [name for name in ("doom", "mood", "room") if name in store] == ["doom", "mood"]
    with pytest.raises(TaskError, match="Unknown task 'room'"):
        store.load(model, ["room"])
    store.load(model, ["doom"])
    assert [task.name for task in model.tasks] == ["doom"]


# What goes wrong


def test_an_append_that_dies_anywhere_leaves_the_old_or_the_new_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before each of its writes, and in the middle of each of them."""
    model = lived_in("bert")
    store = _store(tmp_path / "store", model)
    expected = {name: _outputs(model, "bert", name) for name in ("colour", "mood")}
    _renamed(model, "2")
    write = task_store_files.write_column
    written: list[Path] = []

    def dying_at(place: float) -> Callable[[Path, int, bytes], None]:
        def torn(path: Path, position: int, content: bytes) -> None:
            if len(written) + 1 > place:
                write(path, position, content[: int(len(content) * (place - len(written)))])
                raise KeyboardInterrupt
            write(path, position, content)
            written.append(path)

        return torn

    def dying_last(*_: Any) -> None:
        raise KeyboardInterrupt

    for place in (*(half / 2 for half in range(2 * len(FILES))), len(FILES)):
        written.clear()
        monkeypatch.setattr(task_store_files, "write_column", dying_at(place))
        monkeypatch.setattr(task_store_files, "write_atomically", dying_last)
        with pytest.raises(KeyboardInterrupt):
            store.append(model)
        assert len(written) == int(place)
        assert [task.name for task in TaskStore.open(tmp_path / "store")] == ["colour", "size", "mood"]
    monkeypatch.undo()
    store.append(model)
    again = TaskStore.open(tmp_path / "store")
    assert len(again) == 6
    for name, outputs in expected.items():
        again.load(model, [name, name + "2"])
        assert_same(_outputs(model, "bert", name), outputs)
        assert_same(_outputs(model, "bert", name + "2"), outputs)


def append_forever(folder: Path, count: Any) -> None:
    store, model = TaskStore.open(folder), make_model("bert")
    for number in range(10**6):
        model.task_table.rename(model.tasks[0].name, f"other{number}")
        store.append(model, [f"other{number}"])
        count.value = number + 1


def test_two_writers_lose_nothing_and_a_killed_one_leaves_a_valid_store(tmp_path: Path) -> None:
    model = make_model("bert")
    store = TaskStore.create(tmp_path / "store", model)
    reported = multiprocessing.Value("i", lock=False)
    other = start(append_forever, tmp_path / "store", reported)
    while not reported.value:
        assert other.is_alive()
    for number in range(20):
        model.task_table.rename(model.tasks[0].name, f"mine{number}")
        store.append(model, [f"mine{number}"])
    other.kill()
    other.join()
    store = TaskStore.open(tmp_path / "store")
    names = [task.name for task in store]
    assert [name for name in names if name.startswith("mine")] == [f"mine{number}" for number in range(20)]
    others = [name for name in names if name.startswith("other")]
    assert others == [f"other{number}" for number in range(len(others))]
    assert reported.value <= len(others) <= reported.value + 1  # the last one may have been appended but not reported
    store.append(model, ["mood"])
    store.load(model, [names[0], names[-1], "mood"])
    assert len(model.tasks) == 3


def test_threads_that_append_wait_for_each_other(tmp_path: Path) -> None:
    TaskStore.create(tmp_path / "store", make_model("bert"))

    models = [_renamed(make_model("bert"), str(number)) for number in range(4)]

    def append(model: HyperAdapterModel) -> None:
        TaskStore.open(tmp_path / "store").append(model)

    threads = [threading.Thread(target=append, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({task.name for task in TaskStore.open(tmp_path / "store")}) == 12


@pytest.mark.parametrize("name", [*FILES, "task_store.json"])
def test_a_file_that_is_cut_or_missing_is_named(name: str, tmp_path: Path) -> None:
    _store(tmp_path / "store", make_model("bert"))
    path = tmp_path / "store" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=name):
        TaskStore.open(tmp_path / "store")
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        TaskStore.open(tmp_path / "store")


@pytest.mark.parametrize("name", [*FILES, "task_store.json"])
def test_every_flipped_byte_is_noticed_and_its_file_named(name: str, tmp_path: Path) -> None:
    model = lived_in("bert")
    _store(tmp_path / "store", model)
    path = tmp_path / "store" / name
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=name):
            TaskStore.open(tmp_path / "store").states(range(3), model)
    path.write_bytes(content)
    assert len(list(TaskStore.open(tmp_path / "store"))) == 3


def test_a_removed_task_with_impossible_vectors_is_damage(tmp_path: Path) -> None:
    store = _store(tmp_path / "store", make_model("bert"))
    store.remove(["mood"])
    path = tmp_path / "store" / "tasks.bin"
    tasks = np.frombuffer(path.read_bytes(), TASK).copy()
    tasks["num_keys"] = 2**31
    path.write_bytes(tasks.tobytes())
    with pytest.raises(CheckpointError, match=r"tasks\.bin.*a removed task has vectors that do not exist"):
        TaskStore.open(tmp_path / "store")


def test_a_single_text_is_no_list_of_names(tmp_path: Path) -> None:
    model = make_model("bert")
    store = TaskStore.create(tmp_path / "store", model)
    for change in (store.remove, lambda names: store.append(model, names), lambda names: store.load(model, names)):
        with pytest.raises(TaskError, match="names: expected a list of names of tasks, found the text 'mood'"):
            change("mood")


def test_a_link_out_of_the_folder_is_neither_read_nor_written(tmp_path: Path) -> None:
    model = make_model("bert")
    store = _store(tmp_path / "store", model)
    path = tmp_path / "store" / "records.bin"
    outside = path.rename(tmp_path / "outside.bin")
    content = outside.read_bytes()
    path.symlink_to(outside)
    for use in (lambda: TaskStore.open(tmp_path / "store"), lambda: store.append(_renamed(model, "2"))):
        with pytest.raises(CheckpointError, match=r"records\.bin: expected a file in this folder"):
            use()
    assert outside.read_bytes() == content


def test_a_folder_without_a_store_and_one_that_is_taken_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="no task store here"):
        TaskStore.open(tmp_path)
    with pytest.raises(OutputError, match="already exists"):
        TaskStore.create(tmp_path, make_model("bert"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    TaskStore.create(tmp_path / "store", make_model("bert"))
    path = tmp_path / "store" / "task_store.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match=r"has format 2, .* reads up to 1; upgrade"):
        TaskStore.open(tmp_path / "store")


def test_a_model_whose_tasks_cannot_change_has_no_store(tmp_path: Path) -> None:
    model = make_model("bert", method="hyperformer")
    with pytest.raises(TaskError, match="only 'pha' can change them"):
        TaskStore.create(tmp_path / "store", model)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_task_is_saved_and_served_like_any_other(tmp_path: Path) -> None:
    model = lived_in("bert")
    model.tokenizer = tiny_tokenizer()
    expected = model.predict(["good w1"], task="mood")
    store = _store(tmp_path / "store", model)
    store.load(model, ["mood"])
    model.save_pretrained(tmp_path / "run")
    backbone = model.detach()
    again = HyperAdapterModel.from_pretrained(tmp_path / "run", backbone=backbone)
    assert again.tasks == (Task.classification("mood", ["bad", "good"]),)
    assert again.predict(["good w1"], task="mood")[0].probabilities == expected[0].probabilities
