"""The states of the changes of tasks, in a folder that all servers of a checkpoint share."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from hyperadapters.checkpoints.format import TEMPORARY_PATTERN, TEMPORARY_SECONDS
from hyperadapters.errors import OutputError
from hyperadapters.serving.schemas import JobInfo, Schema
from hyperadapters.utils.files import HeldLock, is_locked, write_atomically

FOLDER = ".jobs"
"""Name of the folder inside the folder of the checkpoint."""
KEPT_JOBS = 1000
"""Number of jobs that can still be asked for."""
OWNER_ENDED = "the server that made the change has ended; the version of the task tells whether it was stored before"
JOB_ID = re.compile("[0-9a-f]{32}")
ENDED = ("done", "failed", "cancelled")


class StoredJob(Schema):
    """A job as it is stored.

    Attributes:
        owner: Identifier of the server that makes the change.
        accepted: Time at which the job was accepted, in seconds since 1970.
        info: State of the job.
    """

    owner: str
    accepted: float
    info: JobInfo


class JobStore:
    """The jobs of all servers of a folder, each of which can show and cancel those of the others.

    Every server holds a lock as long as it lives. A job whose server does not hold its lock any more has failed. Only
    the user of the servers may read the folder, because errors may quote labels.
    """

    def __init__(self, folder: Path) -> None:
        """Store the path; nothing is written before the first job.

        Args:
            folder: Folder of the checkpoint.
        """
        self._folder, self._owner = folder / FOLDER, uuid.uuid4().hex
        self._lock: HeldLock | None = None
        self._ended: dict[str, StoredJob] = {}  # they do not change any more

    def write(self, info: JobInfo) -> None:
        """Store the state of a job of this server.

        Args:
            info: The state.

        Raises:
            OutputError: If the file cannot be written.
        """
        if self._lock is None or not self._lock.is_held:  # or somebody has removed or replaced the folder
            self._open()
        if info.state == "queued":
            self._remove_old()
        stored = StoredJob(owner=self._owner, accepted=time.time() - info.seconds, info=info)
        write_atomically(self._path(info.id), stored.model_dump_json().encode())
        if info.state in ENDED:
            self._request(info.id).unlink(missing_ok=True)

    def read(self, job_id: str) -> JobInfo | None:
        """Return the state of a job of any server, or None if it is unknown.

        Args:
            job_id: Identifier of the job, which may come from a stranger.
        """
        if not JOB_ID.fullmatch(job_id):
            return None
        stored = self._read(self._path(job_id))
        if stored is None:
            return None
        is_alive = self._is_alive(stored.owner)
        stored = self._read(self._path(job_id)) or stored  # a server that ended may have written the end before
        if stored.info.state in ENDED:
            return stored.info
        if not is_alive:
            return stored.info.model_copy(update={"state": "failed", "stage": "", "error": OWNER_ENDED})
        return stored.info.model_copy(update={"seconds": round(max(0.0, time.time() - stored.accepted), 3)})

    def request_cancellation(self, job_id: str) -> None:
        """Ask the server of a job to cancel it.

        Args:
            job_id: Identifier of a job that `read` knows.

        Raises:
            OutputError: If the request cannot be written.
        """
        write_atomically(self._request(job_id), b"")

    def is_cancellation_requested(self, job_id: str) -> bool:
        """Return whether another server asks to cancel a job.

        Args:
            job_id: Identifier of the job.
        """
        return self._request(job_id).exists()

    def examples(self) -> dict[str, int]:
        """Return the numbers of examples that tasks were last fitted to, as far as the jobs tell, by name."""
        jobs = [self._read(path) for path in self._paths()]
        done = [job for job in jobs if job is not None and job.info.state == "done"]
        found: dict[str, int] = {}
        for job in sorted(done, key=lambda job: job.accepted):
            if job.info.action == "remove":
                found.pop(job.info.task, None)
            elif job.info.report is not None and isinstance(examples := job.info.report.get("examples"), int):
                found[job.info.task] = examples
        return found

    def close(self) -> None:
        """Release the lock of this server."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self) -> None:
        """Make the folder, inside one that exists, and hold the lock of this server."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = HeldLock(self._lock_of(self._owner))
        except OSError as error:
            raise OutputError(f"{self._folder}: the changes of tasks cannot be recorded: {error}") from error

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.json"

    def _request(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.cancel"

    def _lock_of(self, owner: str) -> Path:
        return self._folder / f"{owner}.lock"

    def _paths(self) -> list[Path]:
        """Return the files of all jobs."""
        paths = [path for path in self._folder.glob("*.json") if JOB_ID.fullmatch(path.stem)]
        known = {path.stem for path in paths}
        self._ended = {job_id: job for job_id, job in [*self._ended.items()] if job_id in known}
        return paths

    def _read(self, path: Path) -> StoredJob | None:
        """Read a file. One that is gone or damaged is None."""
        if (ended := self._ended.get(path.stem)) is not None:
            return ended
        try:
            stored = StoredJob.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None
        if stored.info.state in ENDED:
            self._ended[path.stem] = stored
        return stored

    def _is_alive(self, owner: str) -> bool:
        return self._lock is not None if owner == self._owner else is_locked(self._lock_of(owner))

    def _remove_old(self) -> None:
        """Remove the oldest jobs, and what servers that were killed have left."""
        with suppress(OSError):
            paths = sorted(self._paths(), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in paths[KEPT_JOBS:]:
                path.unlink(missing_ok=True)
                self._request(path.stem).unlink(missing_ok=True)
            for path in (*self._folder.glob("*.lock"), *self._folder.glob(TEMPORARY_PATTERN)):
                is_old = time.time() - path.stat().st_mtime > TEMPORARY_SECONDS
                if is_old and not (path.suffix == ".lock" and self._is_alive(path.stem)):
                    path.unlink(missing_ok=True)
