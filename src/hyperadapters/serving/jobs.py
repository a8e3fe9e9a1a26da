"""Changes of tasks, which are made one after the other in a worker process while predictions go on."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any, cast

from hyperadapters.errors import HyperAdaptersError, OutputError
from hyperadapters.serving.batching import RefusedError
from hyperadapters.serving.job_store import ENDED, JobStore
from hyperadapters.serving.schemas import JobInfo, JobState
from hyperadapters.serving.served_model import Snapshot
from hyperadapters.serving.worker import Change, run_worker

ASKING_SECONDS = 0.2
"""Interval in which the state of a job of another server is read."""
CANCELLATION_SECONDS = 5.0
"""Time for which the cancellation of a job of another server is waited for."""
IDLE_SECONDS = 10.0
"""Time after the removal of a task after which an idle worker process is ended."""
CAN_COPY = "forkserver" in multiprocessing.get_all_start_methods()
PROCESSES: Any = multiprocessing.get_context("forkserver" if CAN_COPY else "spawn")
"""Where the worker process comes from. It is no copy of the server, which has threads, but of a process that has only
imported what a worker needs, which takes seconds. On Windows, each worker process imports it anew."""
IMPORTED = ("hyperadapters.serving.worker", "hyperadapters.fewshot.add_task")

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
        announced: Digest of the task that the worker is about to store, "" for a task that it is about to remove.
        ended: Event that is set when the job has ended.
    """

    change: Change
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: JobState = "queued"
    stage: str = "waiting"
    error: str | None = None
    report: dict[str, Any] | None = None
    version: int | None = None
    announced: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _accepted: float = field(default_factory=monotonic)
    _seconds: float | None = None

    def set_end(self, state: JobState, error: str | None = None) -> None:
        """Set the final state.

        Args:
            state: The state.
            error: Why the job has failed.
        """
        self.state, self.error, self.stage, self._seconds = state, error, "", monotonic() - self._accepted
        self.change = replace(self.change, examples=())  # nothing of the texts is kept

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
        snapshot: Callable[[], Snapshot],
        switch: Callable[[], Awaitable[None]],
        observe: Callable[[Job], None],
        backbone_module: str,
    ) -> None:
        """Store the settings.

        Args:
            folder: Folder of the checkpoint.
            max_jobs: Maximum number of changes that wait.
            snapshot: Function that returns the tasks of the served model.
            switch: Function that lets the served model switch to the tasks in the folder.
            observe: Function that is called with each job that was running and has ended.
            backbone_module: Name of the Python module of the backbone.
        """
        self._folder, self._max_jobs, self._snapshot = folder, max_jobs, snapshot
        self._switch, self._observe, self._backbone_module = switch, observe, backbone_module
        self._store, self._saving = JobStore(folder), asyncio.Lock()
        self._jobs: dict[str, Job] = {}  # those that have not ended
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._running: Job | None = None
        self._process: Any = None
        self._connection: Connection | None = None
        self._has_removed = self._is_cancelled = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to make changes. Called in the event loop."""
        if CAN_COPY:
            PROCESSES.set_forkserver_preload([*IMPORTED, self._backbone_module])
            forkserver.ensure_running()  # it imports meanwhile
        self._task = asyncio.create_task(self._run())

    async def stop(self, seconds: float) -> None:
        """Finish the change that is being made, and cancel those that wait.

        Args:
            seconds: Time in seconds after which a change that is still being made is cancelled too.
        """
        for job in [*self._jobs.values()]:
            if job.state == "queued":
                await self._end(job, "cancelled")
        if self._running is not None:
            try:
                await asyncio.wait_for(self._running.ended.wait(), seconds)
            except TimeoutError:
                await self._cancel(self._running)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._end_process()
        await asyncio.to_thread(self._store.close)

    async def submit(self, change: Change) -> str:
        """Let a change wait.

        Args:
            change: The change.

        Returns:
            Identifier of the job.

        Raises:
            RefusedError: If too many changes wait.
            OutputError: If the job cannot be stored.
        """
        waiting = sum(job.state == "queued" for job in self._jobs.values())
        if waiting >= self._max_jobs:
            raise RefusedError(f"{waiting} changes of tasks wait, and {self._max_jobs} may; try again later", 10)
        job = Job(change)
        self._jobs[job.id] = job
        try:
            await self._save(job)
        except BaseException:
            self._jobs.pop(job.id, None)  # it may have been cancelled
            raise
        self._queue.put_nowait(job)
        return job.id

    async def info(self, job_id: str, wait: float = 0.0) -> JobInfo | None:
        """Return the state of a job of any server of the folder, or None if it is unknown.

        Args:
            job_id: Identifier of the job.
            wait: Time in seconds to wait for its end. Default: 0.
        """
        end = monotonic() + wait
        if (job := self._jobs.get(job_id)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await job.ended.wait()
            return job.info
        while True:
            info = await asyncio.to_thread(self._store.read, job_id)
            if info is None or info.state in ENDED or monotonic() >= end:
                return info
            await asyncio.sleep(min(ASKING_SECONDS, max(0.0, end - monotonic())))

    def examples(self) -> dict[str, int]:
        """Return the numbers of examples that tasks were last fitted to, as far as that is known, by name."""
        return self._store.examples()

    async def cancel(self, job_id: str) -> JobInfo | None:
        """Cancel a job of any server of the folder. One whose change has been stored already is not cancelled but done.

        Args:
            job_id: Identifier of the job.

        Returns:
            State of the job, which has not ended yet if another server has to end it; None if it is unknown.

        Raises:
            OutputError: If another server cannot be asked to cancel the job.
        """
        job = self._jobs.get(job_id)
        if job is not None:
            await self._cancel(job)
            return job.info
        info = await asyncio.to_thread(self._store.read, job_id)
        if info is None or info.state in ENDED:
            return info
        await asyncio.to_thread(self._store.request_cancellation, job_id)
        return await self.info(job_id, CANCELLATION_SECONDS)

    async def follow_requests(self) -> None:
        """Cancel the jobs that other servers ask to cancel, and store ends that could not be stored before."""
        for job in [*self._jobs.values()]:
            if job.ended.is_set():
                await self._store_end(job)
            elif await asyncio.to_thread(self._store.is_cancellation_requested, job.id):
                await self._cancel(job)

    async def _cancel(self, job: Job) -> None:
        if job.state == "queued":
            await self._end(job, "cancelled")
        elif job is self._running:
            self._is_cancelled = True
            self._end_process()
            await job.ended.wait()

    async def _end(self, job: Job, state: JobState, error: str | None = None) -> None:
        """Store the final state of a job, and forget the job."""
        job.set_end(state, error)
        await self._store_end(job)
        job.ended.set()

    async def _store_end(self, job: Job) -> None:
        try:
            await self._save(job)
            self._jobs.pop(job.id, None)
        except OutputError as failure:  # only this server knows it then, and tries again
            logger.error("the state of a change cannot be stored: %s", failure)

    async def _set_stage(self, job: Job, stage: str) -> None:
        job.stage = stage
        with suppress(OutputError):
            await self._save(job)

    async def _save(self, job: Job) -> None:
        async with self._saving:
            await asyncio.to_thread(self._store.write, job.info)

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
            try:
                await self._end(job, *await self._change(job))
            except HyperAdaptersError as failure:
                logger.error("the tasks in %s cannot be read: %s", self._folder, failure)
                await self._end(job, "failed", str(failure))
            except Exception:
                logger.exception("a change of a task failed")
                reason = "the change failed for an unexpected reason, which the log of the server contains"
                await self._end(job, "failed", reason)
            finally:
                self._running = None
            self._observe(job)

    async def _change(self, job: Job) -> tuple[JobState, str | None]:
        """Make a change, let the model switch to it, and return the state of the job and the error."""
        state, error = await self._make(job)
        await self._set_stage(job, "switching")
        await self._switch()
        snapshot, name = self._snapshot(), job.change.name
        if state == "ended" and job.announced is not None and snapshot.digests.get(name, "") == job.announced:
            state, error = "done", None  # the change was stored before the process was ended
        if state == "ended":
            state = "cancelled" if self._is_cancelled else "failed"
        if state == "done":
            job.version = snapshot.versions.get(name)
        return cast(JobState, state), error

    async def _make(self, job: Job) -> tuple[str, str | None]:
        """Let the worker make a change, and return the state of the job and the error.

        The state is "ended" if the process was ended, so that it is not known whether the change has been stored.
        """
        self._is_cancelled = False
        if self._process is None or not self._process.is_alive():
            await self._set_stage(job, "starting the worker")
            self._process, self._connection = await asyncio.to_thread(self._start_process)
        if self._is_cancelled:
            self._end_process()
            return "ended", None
        connection = self._connection
        assert connection is not None
        try:
            await asyncio.to_thread(connection.send, job.change)
            while True:
                kind, value = await asyncio.to_thread(connection.recv)
                if kind == "stage":
                    await self._set_stage(job, value)
                elif kind == "storing":
                    job.announced = value
                elif kind == "done":
                    job.report = value
                    self._has_removed = self._has_removed or job.change.action == "remove"
                    return "done", None
                else:
                    return "failed", value
        except (EOFError, OSError):
            if self._is_cancelled:
                return "ended", None
            self._end_process()
            return "ended", "the worker process ended unexpectedly; the log of the server may say why"

    def _start_process(self) -> tuple[Any, Connection]:
        connection, other = PROCESSES.Pipe()
        process = PROCESSES.Process(target=run_worker, args=(self._folder, other), name="worker", daemon=True)
        process.start()
        other.close()
        return process, connection

    def _end_process(self) -> None:
        # A thread may still read from the connection, which is closed with the last reference to it.
        process, self._process, self._connection = self._process, None, None
        self._has_removed = False
        if process is not None:
            process.kill()
            process.join()
