"""The server as a process, and the client: start, requests, and a graceful end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
from serving_helpers import EXAMPLES, TEXTS, running_server

from hyperadapters.client import Client, ServerError
from hyperadapters.errors import ServingError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.server import serve
from hyperadapters.serving.settings import ServerSettings


def test_the_client_does_everything_that_the_server_offers(run_folder: Path) -> None:
    model = HyperAdapterModel.from_pretrained(run_folder)
    with running_server(run_folder) as (address, _), Client(address) as client:
        expected = list(Predictor(model)(TEXTS, task="mood"))
        assert [row.probabilities for row in client.predict(TEXTS, "mood")] == [row.probabilities for row in expected]
        assert [[row.task for row in rows] for rows in client.predict_tasks(TEXTS[:2], "*")] == [
            ["colour", "size", "mood"]
        ] * 2
        assert [row.answer for row in client.predict_tasks(TEXTS[:1], ["mood"])[0]] == [expected[0].answer]
        assert len(client.route(TEXTS)) == len(TEXTS)
        added = client.add_task("level/new".replace("/", " ? "), EXAMPLES)
        assert (added.state, added.version) == ("done", client.task("level ? new").version)
        assert client.refit_task("level ? new", EXAMPLES[::-1]).version != added.version
        client.set_threshold("level ? new", -1.0)
        assert client.task("level ? new").threshold == -1.0
        client.set_threshold("level ? new", None)
        assert client.task("level ? new").threshold is None
        job = client.remove_task("level ? new", wait=False)
        assert client.job(job.id, wait=30).state == "done"
        assert [task.name for task in client.tasks()] == ["colour", "size", "mood"]
        assert client.cancel_job(job.id).state == "done"
        with pytest.raises(ServerError, match="Unknown task") as refused:
            client.predict(["w1"], "unknown")
        assert (refused.value.status, refused.value.type, refused.value.retry_after) == (422, "TaskError", None)
        with pytest.raises(ServerError, match="low"):
            client.add_task("new", EXAMPLES, labels=["a", "b"])


@pytest.mark.slow
def test_a_stopped_server_answers_what_it_has_accepted(run_folder: Path) -> None:
    found: list[int] = []
    with running_server(run_folder, "--max-wait-ms", "6000") as (address, process):

        def ask() -> None:
            with Client(address) as client:
                found.append(len(client.predict(TEXTS)))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while f"queued_rows {4 * len(TEXTS)}.0" not in httpx2.get(f"{address}/metrics").text:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert found == [len(TEXTS)] * 4


def test_a_port_that_is_in_use_is_named_before_the_model_is_loaded(run_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=rf"127.0.0.1, port {port}: cannot be listened to: .*--port"):
            serve(run_folder, ServerSettings(port=port), print)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--max-batch-rows", "0"], "max_batch_rows"),
        (["--token-file", "missing.txt"], "the tokens cannot be read"),
    ],
)
def test_a_server_with_wrong_options_does_not_start(run_folder: Path, options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "hyperadapters.cli", "serve", str(run_folder), *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr
