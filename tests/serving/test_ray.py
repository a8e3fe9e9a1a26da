"""Replicas of Ray Serve: a change of a task reaches all of them, and nothing is lost with one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving_helpers import EXAMPLES, OTHER_EXAMPLES, TEXTS, write_run
from typer.testing import CliRunner

from hyperadapters import cli
from hyperadapters.client import Client
from hyperadapters.errors import ServingError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.ray_engine import check_alone, resources_of_replicas, serve_with_ray
from hyperadapters.serving.schemas import PredictionBody
from hyperadapters.serving.settings import ServerSettings

pytest.importorskip("ray", reason="needs the extra 'ray'")

REPLICA = b"ray::ServeReplica:hyperadapters:server"
CLIENTS = 4
PAUSE = 0.1
"""Seconds between two questions of a client, so that the processes that change tasks are not starved."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def ray_server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = write_run(tmp_path / "run")
    with serving(folder) as address:
        yield folder, address


class serving:  # noqa: N801 - a context manager
    """A server with two replicas in other processes."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "hyperadapters.cli", "serve", str(folder), "--engine", "ray", *options]
        self._command = [*command, "--replicas", "2", "--port", str(free_port())]

    def __enter__(self) -> str:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if " at http://" in line:
                return line.split()[-1]
        raise AssertionError("the server has not started")

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(60) == 0
        finally:
            self.process.kill()


def replicas() -> list[int]:
    """The processes of the replicas."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(REPLICA):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


class Load:
    """Threads that ask until they are stopped, and keep what they have asked and got."""

    def __init__(self, address: str) -> None:
        self.found: list[list[PredictionBody]] = []
        self.errors: list[Exception] = []
        self._address, self._stop = address, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def _ask(self) -> None:
        with Client(self._address, retries=6) as client:
            while not self._stop.wait(PAUSE):
                try:
                    self.found.append(client.predict(TEXTS, "mood"))
                except Exception as error:
                    self.errors.append(error)
                    return

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, answers: int) -> None:
        """Wait until there are more answers."""
        wanted, deadline = len(self.found) + answers, time.monotonic() + 60
        while len(self.found) < wanted and not self.errors:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each of two replicas occupies a core")
def test_tasks_reach_all_replicas_and_survive_one_of_them_and_a_restart(ray_server: tuple[Path, str]) -> None:
    folder, address = ray_server
    expected = list(Predictor(HyperAdapterModel.from_pretrained(folder))(TEXTS, task="mood"))
    with Client(address) as client, Load(address) as load:
        added = client.add_task("level", EXAMPLES)
        assert versions(client) == {added.version}
        first = replicas()
        assert len(first) == 2
        load.wait_for(20)
        os.kill(first[0], signal.SIGKILL)
        load.wait_for(100)  # also by the replica that is left
        refitted = client.refit_task("level", OTHER_EXAMPLES)
        assert versions(client) == {refitted.version}
        load.wait_for(50)
        assert versions(client) == {refitted.version}
    assert load.errors == []
    for rows in load.found:
        assert [row.answer for row in rows] == [row.answer for row in expected]
        assert [row.probabilities for row in rows] == [pytest.approx(row.probabilities, abs=1e-4) for row in expected]
    assert HyperAdapterModel.from_pretrained(folder).task_table.versions["level"] == refitted.version


def versions(client: Client) -> set[Any]:
    """The versions of a task that answer several requests, which go to different replicas."""
    return {row.version for _ in range(10) for row in client.predict(TEXTS, "level")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2"], "--engine ray"),
        (["--engine", "other"], "Unknown engine"),
        (["--engine", "ray", "--port", "0"], "choose a port"),
    ],
)
def test_a_server_with_wrong_options_does_not_start(run_folder: Path, options: list[str], message: str) -> None:
    found = CliRunner().invoke(cli.app, ["serve", str(run_folder), *options])
    assert isinstance(found.exception, ServingError)
    assert message in str(found.exception)


def test_what_ray_would_not_explain_is_refused_before_it_is_started(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("admin short\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = ServerSettings(port=taken.getsockname()[1])
        with pytest.raises(ServingError, match="Address already in use; choose another one"):
            serve_with_ray(run_folder, busy, 1, print)
    with pytest.raises(ServingError, match="line 1: expected 'predict' or 'admin'"):
        serve_with_ray(run_folder, ServerSettings(port=free_port(), token_file=tmp_path / "tokens"), 1, print)


def test_a_cluster_with_other_applications_is_refused() -> None:
    actors = [{"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}]
    cluster = SimpleNamespace(util=SimpleNamespace(list_named_actors=lambda all_namespaces: actors))
    with pytest.raises(ServingError, match="Ray Serve runs on the cluster already"):
        check_alone(cluster)  # type: ignore[arg-type]
    actors.clear()
    check_alone(cluster)  # type: ignore[arg-type]


def test_more_replicas_than_cores_are_refused_and_a_gpu_is_divided() -> None:
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0})
    assert resources_of_replicas(cluster, 4) == {"num_cpus": 1, "num_gpus": 0.25}  # type: ignore[arg-type]
    with pytest.raises(ServingError, match="found 5 for 4 cores; choose fewer replicas"):
        resources_of_replicas(cluster, 5)  # type: ignore[arg-type]
