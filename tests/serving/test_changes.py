"""Tasks that change while the server answers: nothing is stale, nothing is lost, and nothing is left."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from helpers import make_model, save_backbone, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from other_processes import start
from serving_helpers import ADDRESS, EXAMPLES, OTHER_EXAMPLES, TEXTS, ended, running_server, write_run
from starlette.testclient import TestClient

from hyperadapters.checkpoints.format import read_checkpoint, save_model, stored_digest
from hyperadapters.checkpoints.update import update_model
from hyperadapters.config import Task
from hyperadapters.errors import CheckpointError, ConflictError, TaskError
from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.app import create_app
from hyperadapters.serving.memory import can_overwrite_free_memory
from hyperadapters.serving.served_model import ServedModel, task_digests, task_tensors
from hyperadapters.serving.settings import ServerSettings
from hyperadapters.serving.worker import Change, FolderEditor

OLD_TASKS = ("colour", "size", "mood")
NEW = {"name": "level", "examples": EXAMPLES}
WORDS = {"low": "no", "high": "yes"}
T5_TASK = {"name": "level", "examples": [{**row, "label": WORDS[row["label"]]} for row in EXAMPLES]}
"""A task whose labels the tiny tokenizer can write."""


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    """A server whose worker process is started once for the tests that do not mind each other's changes."""
    folder = write_run(tmp_path_factory.mktemp("changing") / "run")
    with TestClient(create_app(folder), base_url=ADDRESS) as client:
        yield client, folder


def changed(client: TestClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
    response = client.request(method, f"{path}?wait=60", json=body)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert response.headers["Location"] == f"/v1/jobs/{job['id']}"
    return ended(client, job)


def answers(client: TestClient, task: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.post("/v1/predict", json={"inputs": TEXTS, "task": task}).json()["predictions"]
    return found


def names(client: TestClient) -> list[str]:
    return [task["name"] for task in client.get("/v1/tasks").json()["tasks"]]


def test_a_task_lives_and_goes_and_the_others_answer_the_same_bit_for_bit(
    changing: tuple[TestClient, Path],
) -> None:
    client, folder = changing
    before = {task: [own(row) for row in answers(client, task)] for task in OLD_TASKS}

    added = changed(client, "POST", "/v1/tasks", NEW)
    assert (added["state"], added["report"]["examples"]) == ("done", len(EXAMPLES))
    first = answers(client, "level")
    assert {row["version"] for row in first} == {added["version"]}
    refitted = changed(client, "PUT", "/v1/tasks/level", {"examples": OTHER_EXAMPLES})
    second = answers(client, "level")
    assert {row["version"] for row in second} == {refitted["version"]} != {added["version"]}
    assert {row["digest"] for row in second}.isdisjoint(row["digest"] for row in first)
    assert [row["probabilities"] for row in first] != [row["probabilities"] for row in second]
    set_back = changed(client, "PATCH", "/v1/tasks/level", {"threshold": 0.25})
    assert client.get("/v1/tasks/level").json()["threshold"] == 0.25
    assert {task: [own(row) for row in answers(client, task)] for task in OLD_TASKS} == before

    stored = HyperAdapterModel.from_pretrained(folder)
    expected = list(Predictor(stored)(TEXTS, task="level"))
    assert [row["probabilities"] for row in answers(client, "level")] == [row.probabilities for row in expected]
    assert stored.task_table.versions["level"] == set_back["version"]

    assert 'hyperadapters_jobs_total{action="refit",state="done"} ' in client.get("/metrics").text
    removed = changed(client, "DELETE", "/v1/tasks/level")
    assert (removed["state"], removed["version"], names(client)) == ("done", None, list(OLD_TASKS))
    assert client.post("/v1/predict", json={"inputs": ["w1"], "task": "level"}).status_code == 422
    again = changed(client, "POST", "/v1/tasks", NEW)
    assert again["version"] > set_back["version"]  # a name that is used again never has an earlier version
    assert [row["probabilities"] for row in answers(client, "level")] == [row["probabilities"] for row in first]
    changed(client, "DELETE", "/v1/tasks/level")
    assert {task: [own(row) for row in answers(client, task)] for task in OLD_TASKS} == before


def test_a_task_with_several_labels_for_a_text_is_added_and_answers_with_lists(
    changing: tuple[TestClient, Path],
) -> None:
    client, folder = changing
    rows = [{"text": f"w{n} w{n + 1}", "label": [["low"], [], ["high", "low"]][n % 3]} for n in range(6)]
    added = changed(client, "POST", "/v1/tasks", {"name": "levels", "kind": "multi-label", "examples": rows})
    assert added["state"] == "done"
    described = client.get("/v1/tasks/levels").json()
    assert (described["kind"], described["labels"]) == ("multi-label", ["high", "low"])
    expected = Predictor(HyperAdapterModel.from_pretrained(folder))(TEXTS, task="levels")
    for row, prediction in zip(answers(client, "levels"), expected, strict=True):
        assert tuple(row["answer"]) == prediction.answer
        assert row["probabilities"] == prediction.probabilities
    changed(client, "DELETE", "/v1/tasks/levels")


def test_labels_may_have_descriptions_which_alone_do_not_suffice_for_this_model(
    changing: tuple[TestClient, Path],
) -> None:
    client, folder = changing
    described = {"name": "grade", "labels": {"low": "a bad one", "high": "a good one"}}
    failed = changed(client, "POST", "/v1/tasks", described)
    assert (failed["state"], "no examples; expected at least one" in failed["error"]) == ("failed", True)
    assert changed(client, "POST", "/v1/tasks", {**described, "examples": EXAMPLES})["state"] == "done"
    assert HyperAdapterModel.from_pretrained(folder).tasks[-1].descriptions == described["labels"]
    changed(client, "DELETE", "/v1/tasks/grade")


def own(row: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the other tasks: routing compares with all of them."""
    return {name: value for name, value in row.items() if name != "routing"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/tasks", {"name": "mood", "examples": EXAMPLES}, 409),
        ("POST", "/v1/tasks", {"name": "a/b", "examples": EXAMPLES}, 422),
        ("POST", "/v1/tasks", {"name": "new", "examples": []}, 422),
        ("POST", "/v1/tasks", {"name": "new", "kind": "multi-label", "labels": {"a": "b", "c": "d"}}, 422),
        ("POST", "/v1/tasks", {"name": "new", "labels": {"a": "same", "b": "same"}}, 422),
        ("POST", "/v1/tasks", {"name": "new", "examples": [{"text": "w1", "label": True}]}, 422),
        ("POST", "/v1/tasks", {"name": "new", "examples": [{"text": "w1", "label": ["a", "b"]}]}, 422),
        ("POST", "/v1/tasks", {"name": "new", "examples": EXAMPLES, "fit": "shared"}, 422),
        ("POST", "/v1/tasks?wait=61", {"name": "new", "examples": EXAMPLES}, 422),
        ("PUT", "/v1/tasks/unknown", {"examples": EXAMPLES}, 404),
        ("PATCH", "/v1/tasks/unknown", {"threshold": 0.1}, 404),
        ("PATCH", "/v1/tasks/mood", {"threshold": "0.1"}, 422),
        ("DELETE", "/v1/tasks/unknown", None, 404),
        ("GET", "/v1/jobs/unknown", None, 404),
        ("DELETE", "/v1/jobs/unknown", None, 404),
    ],
)
def test_an_impossible_change_is_refused_at_once(
    changing: tuple[TestClient, Path], method: str, path: str, body: Any, status: int
) -> None:
    client, folder = changing
    before = stored_digest(folder)
    response = client.request(method, path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert stored_digest(folder) == before


def test_a_change_that_fails_says_why_and_changes_nothing(changing: tuple[TestClient, Path]) -> None:
    client, folder = changing
    before = stored_digest(folder)
    job = changed(client, "POST", "/v1/tasks", {"name": "new", "labels": ["a", "b"], "examples": EXAMPLES})
    assert job["state"] == "failed"
    assert "low" in job["error"]
    assert (stored_digest(folder), names(client)) == (before, list(OLD_TASKS))


def test_a_waiting_change_can_be_cancelled_and_a_running_one_too(changing: tuple[TestClient, Path]) -> None:
    client, folder = changing
    before = stored_digest(folder)
    slow = {"name": "slow", "examples": EXAMPLES * 500, "fit": "adapter"}
    running = client.post("/v1/tasks", json=slow).json()
    waiting = client.post("/v1/tasks", json=NEW).json()
    assert client.delete(f"/v1/jobs/{waiting['id']}").json()["state"] == "cancelled"
    assert not any(EXAMPLES[0]["text"] in path.read_text() for path in (folder / ".jobs").iterdir())
    while client.get(f"/v1/jobs/{running['id']}").json()["stage"] != "fitting":
        time.sleep(0.01)
    assert client.delete(f"/v1/jobs/{running['id']}").json()["state"] == "cancelled"
    assert (stored_digest(folder), names(client)) == (before, list(OLD_TASKS))
    assert changed(client, "POST", "/v1/tasks", NEW)["state"] == "done"  # by a new worker process
    assert changed(client, "DELETE", "/v1/tasks/level")["state"] == "done"


def test_too_many_waiting_changes_are_refused(run_folder: Path) -> None:
    with TestClient(create_app(run_folder, ServerSettings(max_jobs=1)), base_url=ADDRESS) as client:
        found = [client.patch("/v1/tasks/mood", json={"threshold": 0.5}) for _ in range(4)]
        assert [response.status_code for response in found][-1] == 503
        assert int(found[-1].headers["Retry-After"]) >= 1


def test_changes_of_another_process_are_followed(client: TestClient, run_folder: Path) -> None:
    model = HyperAdapterModel.from_pretrained(run_folder)
    model.add_task(Task.classification("level", ["low", "high"]), EXAMPLES)
    model.save_pretrained(run_folder)
    deadline = time.monotonic() + 20
    while "level" not in names(client) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {row["digest"] for row in answers(client, "level")} == {task_digests(model)["level"]}


def test_a_damaged_folder_leaves_the_former_tasks_served(client: TestClient, run_folder: Path) -> None:
    before = answers(client, "mood")
    weights = next(run_folder.glob("adapters-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    (run_folder / "hyperadapter.json").write_text((run_folder / "hyperadapter.json").read_text().replace("a", "b"))
    time.sleep(1.5)  # more than the interval in which the folder is examined
    assert answers(client, "mood") == before


# Memory


def found_in_memory(process: int, needles: dict[str, bytes]) -> set[str]:
    """The names of the needles that the writable memory of a process contains."""
    found = set()
    with open(f"/proc/{process}/maps") as maps, open(f"/proc/{process}/mem", "rb", 0) as memory:
        for line in maps:
            addresses, access, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            try:
                memory.seek(start)
                contents = memory.read(end - start) if "w" in access else b""
            except (OSError, ValueError, OverflowError):
                continue
            found |= {name for name, needle in needles.items() if needle in contents}
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    not (can_overwrite_free_memory() and Path("/proc/self/mem").exists()),
    reason="needs the allocator of glibc, and /proc to read the memory of a process",
)
def test_nothing_of_a_removed_task_is_left_in_the_folder_or_in_memory(run_folder: Path) -> None:
    """The server runs in another process, so that what this test reads does not hide what it looks for."""
    with running_server(run_folder) as (address, process), httpx2.Client(base_url=address, timeout=60) as client:
        for name, fit in (("level", "adapter"), ("other", "prototype")):
            client.post("/v1/tasks?wait=60", json={**NEW, "name": name, "fit": fit})
            client.post("/v1/predict", json={"inputs": TEXTS, "task": name})
        client.post("/v1/predict", json={"inputs": TEXTS})
        needles = secrets_of(run_folder, "level", "other")
        children = [
            int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        assert found_in_memory(process.pid, needles)
        for name in ("level", "other"):
            assert client.delete(f"/v1/tasks/{name}?wait=60").json()["state"] == "done"
        client.post("/v1/predict", json={"inputs": TEXTS})
        stored = b"".join(path.read_bytes() for path in run_folder.rglob("*") if path.is_file())
        assert {name for name, needle in needles.items() if needle in stored} == set()
        assert found_in_memory(process.pid, needles) == set()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
            time.sleep(0.2)  # the worker process is ended when it is idle
        assert not any(is_worker(child) for child in children)


def is_worker(child: int) -> bool:
    command = Path(f"/proc/{child}/cmdline")
    return command.exists() and b"spawn_main" in command.read_bytes()


def secrets_of(folder: Path, with_adapter: str, with_prototype: str) -> dict[str, bytes]:
    """Bytes of the heads of two tasks, the adapter of the one, and the prototype of the other."""
    model = HyperAdapterModel.from_pretrained(folder)
    first, second = (model.task_table.states()[model.task_id(name)] for name in (with_adapter, with_prototype))
    assert first.own_adapter is not None
    assert first.head is not None
    assert second.head is not None
    found = {"prototype": second.prototype, "head": first.head.weight[0], "other head": second.head.weight[0]}
    found |= {f"adapter {name}": tensor.flatten()[:8] for name, tensor in first.own_adapter.items()}
    generated = model.method.adapters(torch.tensor([model.task_id(with_prototype)]))
    found |= {f"generated {name}": tensor.flatten()[:8] for name, tensor in generated.items()}
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in found.items() if tensor.any()}


def test_a_folder_with_other_weights_of_the_same_revision_is_followed(client: TestClient, run_folder: Path) -> None:
    model = HyperAdapterModel.from_pretrained(run_folder)
    with torch.no_grad():
        model.heads.weight.neg_()  # type: ignore[union-attr]
    model.save_pretrained(run_folder)
    deadline = time.monotonic() + 20
    while (found := answers(client, "mood")[0])["digest"] != task_digests(model)[
        "mood"
    ] and time.monotonic() < deadline:
        time.sleep(0.05)
    (expected,) = Predictor(model)(TEXTS[:1], task="mood")
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)


def test_a_change_is_done_although_the_card_cannot_be_written(run_folder: Path) -> None:
    (run_folder / "README.md").unlink()
    (run_folder / "README.md").mkdir()
    assert FolderEditor(run_folder).change(Change("remove", "mood"), quiet) is None
    assert [task.name for task in HyperAdapterModel.from_pretrained(run_folder).tasks] == ["colour", "size"]


def test_tasks_are_listed_while_a_batch_is_computed(client: TestClient) -> None:
    with client.app.state.services.served.model.lock:  # type: ignore[attr-defined]
        assert names(client) == list(OLD_TASKS)


# Conflicts and kills


def test_two_editors_of_one_folder_keep_both_changes(run_folder: Path) -> None:
    first, second = FolderEditor(run_folder), FolderEditor(run_folder)
    stages: list[str] = []

    def interfere(kind: str, stage: str) -> None:
        stages.append(stage)
        if stage == "saving" and stages.count("saving") == 1:
            second.change(Change("add", "other", Task.classification("other", ["low", "high"]), OTHER_EXAMPLES), quiet)

    task = Task.classification("level", ["low", "high"])
    assert first.change(Change("add", "level", task, EXAMPLES), interfere) is not None
    assert stages.count("fitting") == 1  # the fitted task is put into the other state, and not fitted anew
    model = HyperAdapterModel.from_pretrained(run_folder)
    assert [known.name for known in model.tasks] == [*OLD_TASKS, "other", "level"]
    alone = FolderEditor(write_run(run_folder.parent / "alone"))
    alone.change(Change("add", "level", task, EXAMPLES), quiet)
    expected = HyperAdapterModel.from_pretrained(run_folder.parent / "alone")
    found = [row.probabilities for row in Predictor(model)(TEXTS, task="level")]
    assert found == [row.probabilities for row in Predictor(expected)(TEXTS, task="level")]


def quiet(kind: str, value: str) -> None:
    """Nothing is to be done with a stage."""


def test_two_editors_cannot_add_the_same_name_twice(run_folder: Path) -> None:
    first, second = FolderEditor(run_folder), FolderEditor(run_folder)
    change = Change("add", "level", Task.classification("level", ["low", "high"]), EXAMPLES)
    calls: list[str] = []

    def interfere(kind: str, stage: str) -> None:
        calls.append(stage)
        if stage == "saving" and calls.count("saving") == 1:
            second.change(change, quiet)

    with pytest.raises(TaskError, match="was added, changed or removed by another process"):
        first.change(change, interfere)
    assert [task.name for task in HyperAdapterModel.from_pretrained(run_folder).tasks] == [*OLD_TASKS, "level"]
    assert second.change(Change("remove", "level"), quiet) is None
    assert first.change(change, quiet) is not None  # the editor that failed still works


def test_a_checkpoint_that_was_changed_is_not_overwritten(run_folder: Path) -> None:
    model = HyperAdapterModel.from_pretrained(run_folder)
    before = stored_digest(run_folder)
    model.rename_task("mood", "temper")
    assert save_model(model, run_folder, replaces=before) == stored_digest(run_folder) != before
    after = read_checkpoint(run_folder)
    with pytest.raises(ConflictError, match="changed by another process"):
        save_model(model, run_folder, replaces=before)
    assert read_checkpoint(run_folder)[0] == after[0]


def test_an_update_brings_every_part_of_every_task(run_folder: Path) -> None:
    model, other = HyperAdapterModel.from_pretrained(run_folder), HyperAdapterModel.from_pretrained(run_folder)
    other.add_task(Task.classification("level", ["low", "high"]), EXAMPLES)
    other.remove_task("colour")
    other.rename_task("mood", "temper")
    other.save_pretrained(run_folder)
    digest = update_model(model, run_folder)
    assert update_model(model, run_folder, known=digest) == digest == stored_digest(run_folder)
    assert model.tasks == other.tasks
    assert (model.task_table.versions, model.task_table.renamed) == (other.task_table.versions, {"temper": "mood"})
    assert model.adapter_state_dict().keys() == other.adapter_state_dict().keys()
    for name, value in other.adapter_state_dict().items():
        assert torch.equal(model.adapter_state_dict()[name], value), name


def test_an_update_from_another_model_is_refused_and_changes_nothing(run_folder: Path) -> None:
    model = HyperAdapterModel.from_pretrained(run_folder)
    before = {name: value.clone() for name, value in model.adapter_state_dict().items()}
    with pytest.raises(CheckpointError, match="other settings or another backbone"):
        update_model(model, write_run(run_folder.parent / "other", prototype_dim=4))
    assert all(torch.equal(value, before[name]) for name, value in model.adapter_state_dict().items())


def test_outdated_tensors_are_overwritten_when_the_tasks_are_switched(run_folder: Path) -> None:
    served = ServedModel(run_folder)
    list(served.predictor(TEXTS, task="mood"))
    outdated = task_tensors(served.model)
    editor = FolderEditor(run_folder)
    editor.change(Change("remove", "mood"), quiet)
    assert served.refresh()
    assert not any(tensor.any() for tensor in outdated.values())
    assert served.predictor.adapter_cache.num_bytes == 0


def change_forever(folder: Path) -> None:
    editor, level = FolderEditor(folder), Task.classification("level", ["low", "high"])
    for change in itertools.cycle([Change("add", "level", level, EXAMPLES), Change("remove", "level")]):
        with suppress(TaskError):  # the process that was killed before may have added the task
            editor.change(change, lambda *_: None)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_leaves_the_old_or_the_new_tasks(run_folder: Path) -> None:
    before = HyperAdapterModel.from_pretrained(run_folder)
    expected = task_digests(before)
    draw = random.Random(0)
    for _ in range(4):
        stored, process = stored_digest(run_folder), start(change_forever, run_folder)
        while stored_digest(run_folder) == stored:
            assert process.is_alive()
        time.sleep(draw.uniform(0.0, 0.4))
        process.kill()
        process.join()
        model = HyperAdapterModel.from_pretrained(run_folder)
        assert [task.name for task in model.tasks] in ([*OLD_TASKS], [*OLD_TASKS, "level"])
        found = task_digests(model)
        assert {name: found[name] for name in OLD_TASKS} == expected
        assert len(list(Predictor(model)(TEXTS))) == len(TEXTS)


# Load


@pytest.mark.slow
def test_under_load_every_answer_is_that_of_the_version_it_names(run_folder: Path) -> None:
    """Other requests of a batch change the last bits of a sum, so numbers are compared to 1e-5: versions differ more.

    The benchmark of the server compares bit for bit, with the same batches.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    done = threading.Event()
    versions: dict[tuple[str, int], HyperAdapterModel] = {}
    with TestClient(create_app(run_folder), base_url=ADDRESS) as client:

        def remember() -> None:
            model = HyperAdapterModel.from_pretrained(run_folder)
            versions.update(dict.fromkeys(model.task_table.versions.items(), model))

        def ask(seed: int) -> None:
            draw = random.Random(seed)
            while not done.is_set():
                text, task = draw.choice(TEXTS), draw.choice([*OLD_TASKS, "level"])
                response = client.post("/v1/predict", json={"inputs": [text], "task": task})
                assert response.status_code == 200 or (task == "level" and "Unknown task" in response.text)
                if response.status_code == 200:
                    found.append((text, response.json()["predictions"][0]))

        remember()
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            changed(client, "POST", "/v1/tasks", NEW)
            remember()
            changed(client, "PUT", "/v1/tasks/level", {"examples": OTHER_EXAMPLES})
            remember()
            changed(client, "DELETE", "/v1/tasks/level")
        done.set()
        for thread in threads:
            thread.join()
    assert {row["version"] for _, row in found if row["task"] == "level"}

    @cache
    def answer(text: str, task: str, version: int) -> tuple[Prediction, str]:
        model = versions[task, version]
        (prediction,) = Predictor(model)([text], task=task)
        return prediction, task_digests(model)[task]

    for text, row in found:
        expected, digest = answer(text, row["task"], row["version"])
        assert row["digest"] == digest
        if expected.probabilities is not None:
            assert row["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        else:
            assert row["answer"] == pytest.approx(expected.answer, rel=1e-5)


@pytest.mark.slow
def test_tasks_can_change_while_texts_are_generated(tmp_path: Path) -> None:
    model = make_model("t5")
    model.tokenizer = tiny_tokenizer()
    model.backbone_name = str(save_backbone(tmp_path / "backbone", "t5"))
    model.save_pretrained(tmp_path / "run")
    found: list[tuple[int, Any]] = []
    done = threading.Event()
    with TestClient(create_app(tmp_path / "run"), base_url=ADDRESS) as client:

        def ask() -> None:
            while not done.is_set():
                response = client.post("/v1/predict", json={"inputs": TEXTS, "task": "mood"})
                found.append((response.status_code, [row["text"] for row in response.json()["predictions"]]))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            jobs = [changed(client, "POST", "/v1/tasks", {**T5_TASK, "fit": "none"})]
            jobs += [changed(client, "DELETE", "/v1/tasks/level"), changed(client, "POST", "/v1/tasks", T5_TASK)]
        finally:
            done.set()
            thread.join()
    assert [(job["state"], job["error"]) for job in jobs] == [("done", None)] * 3
    expected = [prediction.text for prediction in Predictor(model)(TEXTS, task="mood")]
    assert found
    assert all(answer == (200, expected) for answer in found)


ACTIONS: dict[str, Callable[[TestClient], Any]] = {
    "add": lambda client: client.post("/v1/tasks?wait=60", json=NEW),
    "refit": lambda client: client.put("/v1/tasks/level?wait=60", json={"examples": OTHER_EXAMPLES}),
    "remove": lambda client: client.delete("/v1/tasks/level?wait=60"),
    "threshold": lambda client: client.patch("/v1/tasks/level?wait=60", json={"threshold": -1.0}),
}


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(actions=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=5))
def test_any_order_of_changes_gives_what_the_folder_has(changing: tuple[TestClient, Path], actions: list[str]) -> None:
    client, folder = changing
    for action in actions:
        response = ACTIONS[action](client)
        is_there = "level" in names(client)
        assert response.status_code in ((202, 409) if action == "add" else (202, 404))
        assert is_there == (action != "remove" and (action == "add" or is_there))
    stored = json.loads((folder / "hyperadapter.json").read_text())
    found = client.get("/v1/tasks").json()
    assert [task["name"] for task in stored["tasks"]] == [task["name"] for task in found["tasks"]]
    assert stored["revision"] == found["revision"]
    if "level" in names(client):
        ACTIONS["remove"](client)
