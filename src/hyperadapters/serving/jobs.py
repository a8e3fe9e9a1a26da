"""Changes of tasks, which are made one after the other in a worker process while predictions go on."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

from hyperadapters.errors import HyperAdaptersError
from hyperadapters.serving.batching import RefusedError
from hyperadapters.serving.schemas import JobInfo, JobState
from hyperadapters.serving.worker import Change, run_worker

KEPT_JOBS = 1000
"""Number of ended jobs that can still be asked for."""
IDLE_SECONDS = 10.0
"""Time after the removal of a task after which an idle worker process is ended."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A change and its state.

    Attributes:
        change: The change.
        id: Identifier of the job.
        state: State of the job.
        stage: What a running job is doing.
        error: Why the job has failed.
        report: Result of the fit.
        version: Version of the task after the change.
        ended: Event that is set when the job has ended.
    """

    change: Change
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: JobState = "queued"
    stage: str = "waiting"
    error: str | None = None
    report: dict[str, Any] | None = None
    version: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _accepted: float = field(default_factory=monotonic)
    _seconds: float | None = None

    def end(self, state: JobState, error: str | None = None) -> None:
        """Set the final state.

        Args:
            state: The state.
            error: Why the job has failed.
        """
        self.state, self.error, self.stage, self._seconds = state, error, "", monotonic() - self._accepted
        self.change = replace(self.change, examples=())  # nothing of the texts is kept
        self.ended.set()

    @property
    def info(self) -> JobInfo:
        """The state of the job as a response."""
        return JobInfo(
            id=self.id,
            action=self.change.action,
            task=self.change.name,
            state=self.state,
            stage=self.stage,
            seconds=round(monotonic() - self._accepted if self._seconds is None else self._seconds, 3),
            error=self.error,
            report=self.report,
            version=self.version,
        )


class JobRunner:
    """A queue of changes and the worker process that makes them."""

    def __init__(
        self,
        folder: Path,
        max_jobs: int,
        versions: Callable[[], Mapping[str, int]],
        switch: Callable[[], Awaitable[None]],
        observe: Callable[[Job], None],
    ) -> None:
        """Store the settings.

        Args:
            folder: Folder of the checkpoint.
            max_jobs: Maximum number of changes that wait.
            versions: Function that returns the versions of the tasks of the served model.
            switch: Function that lets the served model switch to the tasks in the folder.
            observe: Function that is called with each job that was running and has ended.
        """
        self._folder, self._max_jobs, self._versions = folder, max_jobs, versions
        self._switch, self._observe = switch, observe
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._running: Job | None = None
        self._process: Any = None
        self._connection: Connection | None = None
        self._has_removed = self._is_cancelled = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to make changes. Called in the event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self, seconds: float) -> None:
        """Finish the change that is being made, and cancel those that wait.

        Args:
            seconds: Time in seconds after which a change that is still being made is cancelled too.
        """
        for job in self._jobs.values():
            if job.state == "queued":
                job.end("cancelled")
        if self._running is not None:
            try:
                await asyncio.wait_for(self._running.ended.wait(), seconds)
            except TimeoutError:
                await self.cancel(self._running)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._end_process()

    def submit(self, change: Change) -> Job:
        """Let a change wait.

        Args:
            change: The change.

        Returns:
            The job.

        Raises:
            RefusedError: If too many changes wait.
        """
        waiting = sum(job.state == "queued" for job in self._jobs.values())
        if waiting >= self._max_jobs:
            raise RefusedError(f"{waiting} changes of tasks wait, and {self._max_jobs} may; try again later", 10)
        job = Job(change)
        self._jobs[job.id] = job
        ended = [key for key, known in self._jobs.items() if known.ended.is_set()]
        for key in ended[: max(0, len(self._jobs) - KEPT_JOBS)]:
            del self._jobs[key]
        self._queue.put_nowait(job)
        return job

    def get(self, job_id: str) -> Job | None:
        """Return a job, or None if it is unknown.

        Args:
            job_id: Identifier of the job.
        """
        return self._jobs.get(job_id)

    def examples_of(self, task: str) -> int | None:
        """Return the number of examples that a task was last fitted to; None if that is not known.

        Args:
            task: Name of the task.
        """
        for job in reversed(self._jobs.values()):
            if job.state == "done" and job.change.name == task and job.change.action != "set_threshold":
                return None if job.report is None else int(job.report["examples"])
        return None

    async def cancel(self, job: Job) -> None:
        """Cancel a job. One whose change has been stored already is not cancelled but done.

        Args:
            job: The job.
        """
        if job.state == "queued":
            job.end("cancelled")
        elif job is self._running:
            self._is_cancelled = True
            self._end_process()
            await job.ended.wait()

    async def _run(self) -> None:
        while True:
            try:
                job = await asyncio.wait_for(self._queue.get(), IDLE_SECONDS if self._has_removed else None)
            except TimeoutError:  # nothing of the removed task stays in the memory of the process
                self._end_process()
                continue
            if job.state != "queued":
                continue
            self._running, job.state = job, "running"
            before = self._versions().get(job.change.name)
            try:
                state, error = await self._make(job)
                job.stage = "switching"
                await self._switch()
                job.version = self._versions().get(job.change.name)
                # The change may have been stored before the process was ended.
                is_stored = state == "done" or job.version != before
                job.end("done" if is_stored else state, error)
            except HyperAdaptersError as failure:
                logger.error("the tasks in %s cannot be read: %s", self._folder, failure)
                job.end("failed", str(failure))
            except Exception:
                logger.exception("a change of a task failed")
                job.end("failed", "the change failed for an unexpected reason, which the log of the server contains")
            finally:
                self._running = None
            self._observe(job)

    async def _make(self, job: Job) -> tuple[JobState, str | None]:
        """Let the worker make a change, and return the state of the job and the error."""
        self._is_cancelled = False
        if self._process is None or not self._process.is_alive():
            job.stage = "starting the worker"
            self._process, self._connection = await asyncio.to_thread(self._start_process)
        if self._is_cancelled:
            self._end_process()
            return "cancelled", None
        connection = self._connection
        assert connection is not None
        try:
            await asyncio.to_thread(connection.send, job.change)
            while True:
                kind, value = await asyncio.to_thread(connection.recv)
                if kind == "stage":
                    job.stage = value
                elif kind == "done":
                    job.report = value
                    self._has_removed = self._has_removed or job.change.action == "remove"
                    return "done", None
                else:
                    return "failed", value
        except (EOFError, OSError):
            if self._is_cancelled:
                return "cancelled", None
            self._end_process()
            return "failed", "the worker process ended unexpectedly; the log of the server may say why"

    def _start_process(self) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        process = context.Process(target=run_worker, args=(self._folder, other), name="worker", daemon=True)
        process.start()
        other.close()
        return process, connection

    def _end_process(self) -> None:
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        self._has_removed = False
        if process is not None:
            process.kill()
            process.join()
        if connection is not None:
            connection.close()
