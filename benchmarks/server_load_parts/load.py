"""Load on a server from this process: a closed loop, or an open loop with a fixed rate, and changes of tasks."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np

CONNECTIONS = 64


@dataclass
class Measured:
    """What a load has found.

    Attributes:
        seconds: Duration of the load.
        latencies: Time in seconds of each answered request.
        statuses: Number of responses of each status.
        bodies: Number of responses with status 200 of each pair of inputs and body.
        rows: Number of inputs that were answered.
        late: Number of answered requests that took longer than their deadline.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    bodies: Counter[tuple[str, bytes]] = field(default_factory=Counter)
    rows: int = 0
    late: int = 0

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latencies in milliseconds."""
        return float(np.percentile(self.latencies, percent) * 1000)


Rows = Sequence[dict[str, Any]]


async def _send(session: aiohttp.ClientSession, rows: Rows, timeout_ms: int, found: Measured) -> None:
    inputs = json.dumps(list(rows), sort_keys=True)
    body = f'{{"inputs": {inputs}, "timeout_ms": {timeout_ms}}}'.encode()
    started = perf_counter()
    async with session.post("/v1/predict", data=body, headers={"Content-Type": "application/json"}) as response:
        content = await response.read()
    seconds = perf_counter() - started
    found.statuses[response.status] += 1
    if response.status == 200:
        found.latencies.append(seconds)
        found.bodies[inputs, content] += 1
        found.rows += len(rows)
        found.late += seconds > timeout_ms / 1000


async def closed_loop(
    address: str, draw: Callable[[random.Random], Rows], seconds: float, changes: Any = None
) -> Measured:
    """Let each of `CONNECTIONS` clients send its next request as soon as it has an answer."""
    found, started = Measured(), perf_counter()

    async def client(session: aiohttp.ClientSession, seed: int) -> None:
        generator = random.Random(seed)
        while perf_counter() - started < seconds:
            await _send(session, draw(generator), 60_000, found)

    async with _session(address) as session:
        tasks = [client(session, seed) for seed in range(CONNECTIONS)]
        await asyncio.gather(*tasks, *([changes(session, started, seconds)] if changes else []))
    found.seconds = perf_counter() - started
    return found


async def open_loop(
    address: str, draw: Callable[[random.Random], Rows], seconds: float, rate: float, timeout_ms: int
) -> Measured:
    """Send requests at random times with a mean rate per second, whether or not earlier ones are answered."""
    found, started, generator = Measured(), perf_counter(), random.Random(0)
    running: set[asyncio.Task[None]] = set()
    async with _session(address) as session:
        due = 0.0
        while due < seconds:
            due += generator.expovariate(rate)
            await asyncio.sleep(max(0.0, due - (perf_counter() - started)))
            task = asyncio.create_task(_send(session, draw(generator), timeout_ms, found))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    found.seconds = perf_counter() - started
    return found


def _session(address: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(address, connector=connector, timeout=aiohttp.ClientTimeout(total=120))


async def change_tasks(
    session: aiohttp.ClientSession, started: float, seconds: float, examples: Sequence[list[Any]], per_minute: float
) -> Counter[str]:
    """Add, refit and remove tasks in turn, at a mean number of changes per minute.

    Args:
        session: Connections to the server.
        started: Time at which the load has started.
        seconds: Duration of the load.
        examples: For each of several tasks, four parts of its examples.
        per_minute: Number of changes per minute.

    Returns:
        Number of changes that ended in each state.
    """
    states: Counter[str] = Counter()
    generator, number, present = random.Random(1), 0, ""
    parts: list[Any] = []
    while perf_counter() - started < seconds - 1:
        begun = perf_counter()
        if not present:
            number, parts = number + 1, generator.choice(examples)
            present = f"new {number}"
            request = session.post("/v1/tasks?wait=60", json={"name": present, "examples": parts[0]})
        elif len(parts) > 2:
            parts = parts[2:]
            request = session.put(f"/v1/tasks/{present}?wait=60", json={"examples": parts[0]})
        else:
            request = session.delete(f"/v1/tasks/{present}?wait=60")
            present = ""
        async with request as response:
            states[(await response.json()).get("state", f"status {response.status}")] += 1
        await asyncio.sleep(max(0.0, 60 / per_minute - (perf_counter() - begun)))
    return states
