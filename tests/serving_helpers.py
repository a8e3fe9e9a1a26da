"""What the tests of the server share: a folder with a model of tiny tasks, and examples of new tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import lived_in, save_backbone, stirred
from starlette.testclient import TestClient

ADDRESS = "http://127.0.0.1:8000"
TEXTS = [
    "w1 good w2",
    "w3 bad",
    "w5 w6 w7 w8 red",
    "yes w9",
    "no w10 w11",
    "blue",
    "w12 w13 w14",
    "w1 w1 w1 w1 w1 w1",
]
EXAMPLES = [
    {"text": "w1 w2 w3", "label": "low"},
    {"text": "w4 w2", "label": "low"},
    {"text": "good red yes", "label": "high"},
    {"text": "good blue", "label": "high"},
]
OTHER_EXAMPLES = [{"text": row["text"], "label": "high" if row["label"] == "low" else "low"} for row in EXAMPLES]


def write_run(folder: Path, **settings: Any) -> Path:
    """A checkpoint of a model with three tasks, in which everything that a task can have is there."""
    model = stirred(lived_in("bert", **{"prototype_dim": 8, "hidden_dim": 6, "feature_layer": 1, **settings}))
    model.backbone_name = str(save_backbone(folder.parent / f"{folder.name}-backbone"))
    model.save_pretrained(folder)
    return folder


def ended(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    """The state of a job when it is no longer running, however slow the machine is."""
    while job["state"] in ("queued", "running"):
        job = client.get(f"/v1/jobs/{job['id']}?wait=60").json()
    return job


class running_server:  # noqa: N801 - a context manager
    """A server in another process."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._command = [sys.executable, "-m", "hyperadapters.cli", "serve", str(folder), "--port", "0", *options]

    def __enter__(self) -> tuple[str, subprocess.Popen[str]]:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ}
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at http://127.0.0.1:" in line, line
        return line.split()[-1], self.process

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
