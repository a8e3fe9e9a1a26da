"""A floor of the server's throughput: the queue must not cost more than it gains over a bare endpoint."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import httpx2
from serving_helpers import TEXTS, running_server

FLOOR = 0.5
ROUNDS, REQUESTS, CLIENTS = 3, 120, 8
BARE = """
import socket, sys
import uvicorn
from fastapi import FastAPI
from hyperadapters.inference.predictor import Predictor

predictor = Predictor.from_pretrained(sys.argv[1])
app = FastAPI()

@app.post("/v1/predict")
def predict(body: dict) -> list:
    return [{"task": found.task, "answer": found.answer} for found in predictor(body["inputs"], task=body["task"])]

listener = socket.create_server(("127.0.0.1", 0))
print("http://127.0.0.1:%d" % listener.getsockname()[1], flush=True)
uvicorn.run(app, fd=listener.fileno(), log_level="error", access_log=False)
"""


def requests_per_second(address: str) -> float:
    with httpx2.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(CLIENTS) as pool:

        def ask(index: int) -> int:
            body = {"inputs": [TEXTS[index % len(TEXTS)]], "task": ("colour", "size", "mood")[index % 3]}
            return client.post("/v1/predict", json=body).status_code

        started = perf_counter()
        assert set(pool.map(ask, range(REQUESTS))) == {200}
        return REQUESTS / (perf_counter() - started)


def test_the_server_is_not_much_slower_than_a_bare_endpoint_around_the_predictor(run_folder: Path) -> None:
    """Both are measured in turn; the best ratio counts, because another process may disturb one of them."""
    command = [sys.executable, "-c", BARE, str(run_folder)]
    with (
        running_server(run_folder) as (address, _),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as bare,
    ):
        try:
            assert bare.stdout is not None
            bare_address = bare.stdout.readline().strip()
            ratios = [requests_per_second(address) / requests_per_second(bare_address) for _ in range(ROUNDS)]
        finally:
            bare.kill()
    assert max(ratios) >= FLOOR
