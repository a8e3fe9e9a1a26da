"""Fixtures of the server's tests: a folder with a model, and the application in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_helpers import ADDRESS, write_run
from starlette.testclient import TestClient

from hyperadapters.serving.app import create_app


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def client(run_folder: Path) -> Iterator[TestClient]:
    with TestClient(create_app(run_folder), base_url=ADDRESS, raise_server_exceptions=False) as found:
        yield found
