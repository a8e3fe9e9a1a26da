"""Micro-batching: requests that wait are answered together, in the order in which they came."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from hyperadapters.errors import DataError, HyperAdaptersError
from hyperadapters.serving.served_model import Answer, Question

CHARACTERS_PER_TOKEN = 4
MARGIN = 0.7
"""Part of the time until its deadline in which a question must be expected to be answered, to be accepted."""
SMOOTHING = 0.8
"""Weight of earlier batches in the estimated time for an input."""

SWITCH_SECONDS = 5e-4
"""Time in seconds for which a Python thread may keep the interpreter while others wait.

A batch gives it up for each of several hundred operations. With Python's default of 5 ms, it would wait too long for
the event loop to return it.
"""

logger = logging.getLogger(__name__)


class RefusedError(HyperAdaptersError):
    """A request is not accepted now.

    Attributes:
        retry_after: Time in seconds after which the request may be accepted.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        """Store the message and the time.

        Args:
            message: Why the request is not accepted, and what to do.
            retry_after: Time in seconds after which it may be accepted.
        """
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(HyperAdaptersError):
    """A request could not be answered before its deadline."""


@dataclass(eq=False)
class Waiting:
    """A question that waits for its answer.

    Attributes:
        question: The question.
        deadline: Time of the monotonic clock before which it must be answered.
        future: Future of the answer, which belongs to the event loop of the server.
        since: Time of the monotonic clock at which it was accepted.
        rows: Number of its inputs, counted once for each task that is answered.
        tokens: Estimated number of tokens of its inputs.
    """

    question: Question
    deadline: float
    future: asyncio.Future[Any]
    since: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class BatchTimes:
    """What was measured for a batch.

    Attributes:
        rows: Number of inputs.
        queue: Time in seconds that each of its questions waited.
        seconds: Time in seconds that the batch took.
        answers: Answers to its questions, or the errors in them.
    """

    rows: int
    queue: Sequence[float]
    seconds: float
    answers: Sequence[Answer | Exception] = ()


@dataclass
class MicroBatcher:
    """A bounded queue and a thread that answers what waits in it.

    Attributes:
        answer: Function that answers questions together. It is called in the thread.
        max_rows: Maximum number of inputs in a batch, unless a question has more.
        max_tokens: Maximum number of tokens in a batch, unless a question has more.
        max_wait: Time in seconds for which an idle thread waits for further questions.
        max_queue_rows: Maximum number of inputs that wait.
        observe: Function that is called in the thread with the measurements of each batch.
    """

    answer: Callable[[Sequence[Question]], Sequence[Answer | HyperAdaptersError]]
    max_rows: int
    max_tokens: int
    max_wait: float
    max_queue_rows: int
    observe: Callable[[BatchTimes], None]
    _queue: deque[Waiting] = field(default_factory=deque)
    _calls: deque[tuple[Callable[[], object], asyncio.Future[Any]]] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _is_stopping: bool = False
    _queued_rows: int = 0
    _running_rows: int = 0
    _seconds_per_row: float = 0.0
    _thread: threading.Thread | None = None
    _switch_interval: float = 0.0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread, and lower the switch interval of the interpreter.

        Args:
            loop: Event loop of the futures.
        """
        self._loop = loop
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH_SECONDS, self._switch_interval))
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse further questions, answer those that wait, end the thread, and restore the switch interval."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            sys.setswitchinterval(self._switch_interval)

    @property
    def queued_rows(self) -> int:
        """Number of inputs that wait."""
        return self._queued_rows

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and accepts questions."""
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    def submit(self, question: Question, timeout: float, num_tasks: int) -> asyncio.Future[Any]:
        """Let a question wait for its answer. Called in the event loop.

        Args:
            question: The question.
            timeout: Time in seconds in which it must be answered.
            num_tasks: Number of tasks that are answered for each input.

        Returns:
            Future of the answer. Its exception is a `HyperAdaptersError` if the question or an input is invalid, or a
            `DeadlineError`.

        Raises:
            DataError: If the question alone has more inputs than may wait.
            RefusedError: If too many inputs wait, the answer would come too late, or the server is being stopped.
        """
        now, rows = monotonic(), len(question.inputs) * num_tasks
        waiting = Waiting(question, now + timeout, self._loop.create_future(), now, rows, _tokens(question.inputs))
        if rows > self.max_queue_rows:
            raise DataError(
                f"expected at most {self.max_queue_rows} answers in a request, found {rows} (inputs times tasks); "
                "send several requests"
            )
        with self._changed:
            self._check_alive()
            before = self._queued_rows
            delay = (before + self._running_rows) * self._seconds_per_row
            if before and before + rows > self.max_queue_rows:
                raise RefusedError(f"{before} inputs wait, and {self.max_queue_rows} may; try again later", delay)
            if delay + rows * self._seconds_per_row > MARGIN * timeout and before:
                raise RefusedError(f"the answer would take about {delay:.1f} s; try again later", delay)
            self._queue.append(waiting)
            self._queued_rows += rows
            self._changed.notify_all()
        return waiting.future

    def call(self, function: Callable[[], object]) -> asyncio.Future[Any]:
        """Let the thread call a function between two batches. Called in the event loop.

        Args:
            function: The function.

        Returns:
            Future of its result.

        Raises:
            RefusedError: If the server is being stopped.
        """
        future: asyncio.Future[Any] = self._loop.create_future()
        with self._changed:
            self._check_alive()
            self._calls.append((function, future))
            self._changed.notify_all()
        return future

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise RefusedError("the server is being stopped; send the request to another one", 5)

    def _run(self) -> None:
        while self._wait():
            self._make_calls()
            batch = self._take()
            started = monotonic()
            expired = [waiting for waiting in batch if waiting.deadline <= started or waiting.future.cancelled()]
            valid = [waiting for waiting in batch if waiting not in expired]
            found = self._answers(valid)
            late = DeadlineError("the request could not be answered before its deadline; try again later")
            results = [*zip(valid, found, strict=True), *((waiting, late) for waiting in expired)]
            self._measure(valid, found, started, monotonic() - started)
            try:
                self._loop.call_soon_threadsafe(_deliver, results)
            except RuntimeError:  # the event loop was closed without a graceful stop
                return

    def _wait(self) -> bool:
        """Wait until there is something to do, and return False if the thread is to end."""
        with self._changed:
            while not (self._queue or self._calls or self._is_stopping):
                self._changed.wait()
            return bool(self._queue or self._calls)

    def _take(self) -> list[Waiting]:
        """Return the first questions that wait, after a short time in which others may come."""
        with self._changed:
            while self._queue and not self._is_stopping and self._queued_rows < self.max_rows:
                left = self._queue[0].since + self.max_wait - monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            batch: list[Waiting] = []
            rows = tokens = 0
            while self._queue:
                rows, tokens = rows + self._queue[0].rows, tokens + self._queue[0].tokens
                if batch and (rows > self.max_rows or tokens > self.max_tokens):
                    break
                batch.append(self._queue.popleft())
            self._running_rows = sum(waiting.rows for waiting in batch)
            self._queued_rows -= self._running_rows
            return batch

    def _make_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            result: object
            try:
                result = function()
            except Exception as error:
                result = error
            self._loop.call_soon_threadsafe(_settle, future, result)

    def _answers(self, batch: Sequence[Waiting]) -> Sequence[Answer | Exception]:
        try:
            return self.answer([waiting.question for waiting in batch]) if batch else []
        except Exception as error:
            if len(batch) == 1:
                logger.exception("a question could not be answered")
                return [error]
        return [self._answers([waiting])[0] for waiting in batch]  # so that only those that are to blame fail

    def _measure(
        self, batch: Sequence[Waiting], found: Sequence[Answer | Exception], started: float, seconds: float
    ) -> None:
        rows = sum(waiting.rows for waiting in batch)
        with self._changed:
            self._running_rows = 0
        if not batch:
            return
        with self._changed:
            # It begins with 0, since the first batch of a process takes longer than all others.
            self._seconds_per_row = SMOOTHING * self._seconds_per_row + (1 - SMOOTHING) * seconds / rows
        self.observe(BatchTimes(rows, [started - waiting.since for waiting in batch], seconds, found))


def _deliver(results: Sequence[tuple[Waiting, Any]]) -> None:
    for waiting, result in results:
        _settle(waiting.future, result)


def _settle(future: asyncio.Future[Any], result: object) -> None:
    """Set the result of a future, which is an error or not, unless nobody waits for it any more."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _tokens(inputs: Sequence[Any]) -> int:
    """Estimate the number of tokens of inputs."""
    return sum(math.ceil(len(text) / CHARACTERS_PER_TOKEN) for row in inputs for text in _texts(row))


def _texts(row: Any) -> Sequence[str]:
    return (row,) if isinstance(row, str) else (row["text"], row.get("text_pair") or "")
