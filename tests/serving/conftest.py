"""Fixtures of the server's tests: a folder with a model, and the application in this process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_helpers import ADDRESS, write_run
from starlette.testclient import TestClient

from hyperadapters.serving.app import create_app

IMPORTED_BY_WORKERS = [
    "hyperadapters.serving.worker",
    "hyperadapters.fewshot.add_task",
    "transformers.models.bert.modeling_bert",
]


@pytest.fixture(autouse=True)
def _quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of servers in this process are copies of a process that has imported what they need.

    Servers in other processes start theirs as users' servers do.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(IMPORTED_BY_WORKERS)
        monkeypatch.setattr("hyperadapters.serving.jobs.PROCESSES", multiprocessing.get_context("forkserver"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def client(run_folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(run_folder), base_url=ADDRESS, raise_server_exceptions=False) as found:
        yield found
