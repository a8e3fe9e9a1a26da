"""Several servers of one folder: each shows the changes of the others at once, and none is lost with its server."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving_helpers import ADDRESS, EXAMPLES, OTHER_EXAMPLES, TEXTS, running_server
from starlette.testclient import TestClient

from hyperadapters.config import Task
from hyperadapters.errors import OutputError, TaskError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.app import create_app
from hyperadapters.serving.job_store import FOLDER, KEPT_JOBS, OWNER_ENDED, JobStore
from hyperadapters.serving.schemas import JobInfo
from hyperadapters.serving.settings import ServerSettings
from hyperadapters.serving.worker import Change, FolderEditor
from hyperadapters.utils.files import HeldLock, is_locked

NEW = {"name": "level", "examples": EXAMPLES}
OTHERS = [{"text": row["text"], "label": f"other {row['label']}"} for row in EXAMPLES]


@pytest.fixture
def replicas(run_folder: Path) -> Iterator[tuple[TestClient, TestClient]]:
    """Two servers that do not examine the folder unless a request comes."""
    with ExitStack() as stack:
        settings = ServerSettings(poll_seconds=1000)
        apps = [create_app(run_folder, settings) for _ in range(2)]
        first, second = (stack.enter_context(TestClient(app, base_url=ADDRESS)) for app in apps)
        yield first, second


def test_a_change_that_is_done_is_seen_by_the_next_request_to_any_server(
    replicas: tuple[TestClient, TestClient],
) -> None:
    first, second = replicas
    body = {"inputs": TEXTS, "task": "level"}
    for method, path, change in (
        ("POST", "/v1/tasks", NEW),
        ("PUT", "/v1/tasks/level", {"examples": OTHER_EXAMPLES}),
        ("PATCH", "/v1/tasks/level", {"threshold": 0.5}),
    ):
        job = first.request(method, path, json=change).json()
        ended = second.get(f"/v1/jobs/{job['id']}?wait=60").json()
        assert (ended["state"], ended["task"], ended["id"]) == ("done", "level", job["id"])
        found = second.post("/v1/predict", json=body).json()["predictions"]
        assert {row["version"] for row in found} == {ended["version"]}
        assert found == first.post("/v1/predict", json=body).json()["predictions"]
        info = second.get("/v1/tasks/level").json()
        assert (info["version"], info["examples"]) == (ended["version"], len(EXAMPLES))
    removed = second.delete("/v1/tasks/level?wait=60").json()
    assert removed["state"] == "done"
    assert first.post("/v1/predict", json=body).status_code == 422
    assert first.get("/v1/tasks/level").status_code == 404
    assert first.get(f"/v1/jobs/{removed['id']}").json() == removed


@pytest.mark.slow
def test_a_job_is_cancelled_through_another_server(run_folder: Path) -> None:
    with ExitStack() as stack:
        apps = [create_app(run_folder, ServerSettings(poll_seconds=0.05)) for _ in range(2)]
        first, second = (stack.enter_context(TestClient(app, base_url=ADDRESS)) for app in apps)
        jobs = [first.post("/v1/tasks", json={**NEW, "name": f"level{index}"}).json()["id"] for index in range(3)]
        cancelled = second.delete(f"/v1/jobs/{jobs[2]}").json()
        states = [second.get(f"/v1/jobs/{job}?wait=60").json()["state"] for job in jobs]
        assert (cancelled["state"], states) == ("cancelled", ["done", "done", "cancelled"])
        assert second.get("/v1/tasks/level1").status_code == 200
        assert second.get("/v1/tasks/level2").status_code == 404
        assert second.delete(f"/v1/jobs/{jobs[0]}").json()["state"] == "done"
        assert second.delete(f"/v1/jobs/{'0' * 32}").status_code == 404


@pytest.mark.slow
def test_a_killed_server_leaves_no_worker_its_jobs_have_failed_and_ended_ones_are_kept(run_folder: Path) -> None:
    with (
        TestClient(create_app(run_folder), base_url=ADDRESS) as other,
        running_server(run_folder) as (address, process),
        httpx2.Client(base_url=address, timeout=60) as client,
    ):
        done = client.post("/v1/tasks?wait=60", json={**NEW, "name": "first"}).json()
        job = start_slow(client, "slow")
        workers = [path.parent for path in Path("/proc").glob("[0-9]*/status") if parent_of(path) == process.pid]
        assert workers
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(worker.exists() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found = other.get(f"/v1/jobs/{job}?wait=60").json()
        assert (found["state"], found["error"]) == ("failed", OWNER_ENDED)
        assert other.get(f"/v1/jobs/{done['id']}").json() == done
        # The next change is not hindered by what the dead server has left, which is removed some time later.
        lock = run_folder / FOLDER / f"{owner_of(run_folder, job)}.lock"
        os.utime(lock, (0, 0))
        assert other.post("/v1/tasks?wait=60", json={**NEW, "name": "next"}).json()["state"] == "done"
        assert not lock.exists()
    with TestClient(create_app(run_folder), base_url=ADDRESS) as restarted:
        assert restarted.get(f"/v1/jobs/{done['id']}").json() == done
        assert restarted.get("/v1/tasks/next").json()["examples"] == len(EXAMPLES)


def owner_of(folder: Path, job: str) -> Any:
    return json.loads((folder / FOLDER / f"{job}.json").read_bytes())["owner"]


def test_of_two_additions_of_one_name_only_the_stored_one_is_done(replicas: tuple[TestClient, TestClient]) -> None:
    bodies = [{"name": "same", "examples": EXAMPLES}, {"name": "same", "examples": OTHERS}]
    jobs = [client.post("/v1/tasks", json=body).json()["id"] for client, body in zip(replicas, bodies, strict=True)]
    found = [client.get(f"/v1/jobs/{job}?wait=60").json() for client, job in zip(replicas, jobs, strict=True)]
    assert sorted(job["state"] for job in found) == ["done", "failed"]
    for client in replicas:
        for job, body in zip(found, bodies, strict=True):
            if job["state"] == "done":
                assert {*client.get("/v1/tasks/same").json()["labels"]} == labels_of(body)
            else:
                assert "meanwhile" in job["error"] or "exists" in job["error"]
                assert job["version"] is None


def labels_of(body: Any) -> set[str]:
    return {row["label"] for row in body["examples"]}


@pytest.mark.slow
def test_a_cancelled_addition_is_not_done_because_another_server_has_added_the_name(
    replicas: tuple[TestClient, TestClient],
) -> None:
    first, second = replicas
    second.post("/v1/tasks?wait=60", json={"name": "warm", "examples": EXAMPLES})  # starts its worker
    job = start_slow(first, "same")
    body = {"name": "same", "examples": OTHERS}
    assert second.post("/v1/tasks?wait=60", json=body).json()["state"] == "done"
    assert first.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    assert {*first.get("/v1/tasks/same").json()["labels"]} == labels_of(body)


def start_slow(client: Any, name: str) -> str:
    """Start a change that takes long, and wait until it is being fitted."""
    job: str = client.post("/v1/tasks", json={"name": name, "examples": EXAMPLES * 500, "fit": "adapter"}).json()["id"]
    deadline = time.monotonic() + 60
    while client.get(f"/v1/jobs/{job}").json()["stage"] != "fitting":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return job


@pytest.mark.slow
def test_many_requests_at_once_see_a_change_that_is_done(replicas: tuple[TestClient, TestClient]) -> None:
    first, second = replicas

    def threshold(_: int) -> Any:
        return second.get("/v1/tasks/mood").json()["threshold"]

    with ThreadPoolExecutor(16) as pool:
        for number in range(8):
            first.patch("/v1/tasks/mood?wait=60", json={"threshold": float(number)})
            assert {*pool.map(threshold, range(16))} == {float(number)}


def test_a_refit_does_not_undo_what_another_process_does_meanwhile(run_folder: Path) -> None:
    editor, other = FolderEditor(run_folder), FolderEditor(run_folder)
    added = Task.classification("mood", ["high", "low"])

    def meanwhile(kind: str, value: str) -> None:
        if value == "saving":
            other.change(Change("remove", "mood"), lambda *_: None)
            other.change(Change("add", "mood", added, EXAMPLES), lambda *_: None)

    rows = [{"text": row["text"], "label": label} for row, label in zip(EXAMPLES, ["bad", "good"] * 2, strict=True)]
    with pytest.raises(TaskError, match="was added, changed or removed by another process meanwhile"):
        editor.change(Change("refit", "mood", None, rows), meanwhile)
    assert HyperAdapterModel.from_pretrained(run_folder).tasks[-1] == added


def test_jobs_go_on_after_somebody_has_removed_their_folder(replicas: tuple[TestClient, TestClient]) -> None:
    first, second = replicas
    first.post("/v1/tasks?wait=60", json=NEW)
    folder = first.app.state.services.served.folder / FOLDER  # type: ignore[attr-defined]
    shutil.rmtree(folder)
    job = first.put("/v1/tasks/level", json={"examples": EXAMPLES}).json()["id"]
    assert second.get(f"/v1/jobs/{job}?wait=60").json()["state"] == "done"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_lock_is_seen_while_its_owner_lives_however_many_look(tmp_path: Path) -> None:
    lock, free = HeldLock(tmp_path / "owner.lock"), tmp_path / "free.lock"
    free.touch()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: is_locked(tmp_path / "owner.lock"), range(200)))
        assert not any(pool.map(lambda _: is_locked(free), range(200)))
    assert lock.is_held
    lock.release()
    assert not is_locked(tmp_path / "owner.lock")


def parent_of(status: Path) -> int:
    """The parent of a process, 0 if it has ended."""
    with suppress(OSError):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("PPid:"))
    return 0


def job_info(number: int, **values: Any) -> JobInfo:
    found = {"id": f"{number:032x}", "action": "add", "task": "t", "state": "done", "stage": "", "seconds": 1.0}
    return JobInfo.model_validate({**found, "error": None, "report": None, "version": 1, **values})


def test_jobs_that_were_not_stored_are_unknown_and_no_other_file_is_read(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    assert store.read("0" * 32) is None
    store.write(job_info(1))
    (tmp_path / "secret.json").write_bytes((tmp_path / FOLDER / f"{1:032x}.json").read_bytes())
    for name in ("../secret", "secret", "", f"{1:032x}\n", f"{1:032X}".replace("0", "A"), "x" * 32):
        assert store.read(name) is None
    assert store.read(f"{1:032x}") == job_info(1)
    (tmp_path / FOLDER / f"{2:032x}.json").write_text("{")
    assert store.read(f"{2:032x}") is None


def test_the_oldest_jobs_are_forgotten(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.write(job_info(0))
    folder = tmp_path / FOLDER
    template = (folder / f"{0:032x}.json").read_text()
    for number in range(1, KEPT_JOBS + 5):
        (folder / f"{number:032x}.json").write_text(template.replace(f"{0:032x}", f"{number:032x}"))
    time.sleep(0.01)
    store.write(job_info(KEPT_JOBS + 5, state="queued"))
    store.write(job_info(KEPT_JOBS + 6, state="queued"))
    kept = list(folder.glob("*.json"))
    assert len(kept) == KEPT_JOBS + 1  # the last one was written after the old ones were removed
    assert store.read(f"{KEPT_JOBS + 5:032x}") is not None


def test_the_examples_of_a_task_are_those_of_its_last_fit(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.write(job_info(1, task="a", report={"examples": 4}, seconds=9.0))
    store.write(job_info(2, task="a", action="refit", report={"examples": 6}, seconds=8.0))
    store.write(job_info(3, task="a", action="set_threshold", seconds=7.0))
    store.write(job_info(4, task="b", report={"examples": 5}, seconds=6.0))
    store.write(job_info(5, task="b", action="remove", seconds=5.0))
    store.write(job_info(6, task="c", state="failed", report={"examples": 5}, seconds=4.0))
    assert store.examples() == {"a": 6}


def test_a_change_that_cannot_be_recorded_is_refused(run_folder: Path) -> None:
    (run_folder / FOLDER).write_text("in the way")
    with TestClient(create_app(run_folder), base_url=ADDRESS) as client:
        refused = client.post("/v1/tasks", json=NEW)
        assert (refused.status_code, refused.json()["error"]["type"]) == (500, OutputError.__name__)
        assert client.post("/v1/predict", json={"inputs": TEXTS}).status_code == 200
