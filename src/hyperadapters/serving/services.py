"""The parts of a running server, and what connects them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field

from hyperadapters.errors import HyperAdaptersError
from hyperadapters.inference.predictor import Prediction
from hyperadapters.serving.batching import DeadlineError, MicroBatcher, RefusedError
from hyperadapters.serving.jobs import JobRunner
from hyperadapters.serving.memory import overwrite_free_memory, return_free_memory
from hyperadapters.serving.metrics import ServerMetrics
from hyperadapters.serving.served_model import Answer, Question, ServedModel
from hyperadapters.serving.settings import ServerSettings
from hyperadapters.serving.task_map import TaskMap

RETURN_SECONDS = 10.0
"""Interval in seconds in which free memory is returned to the system."""

logger = logging.getLogger(__name__)


@dataclass
class Services:
    """The parts of a running server.

    Attributes:
        served: The model.
        settings: Settings of the server.
        metrics: Metrics of the server.
        batcher: Queue of the questions.
        jobs: Queue of the changes of tasks.
        task_map: Map of prototypes and recent inputs.
    """

    served: ServedModel
    settings: ServerSettings
    metrics: ServerMetrics = field(init=False)
    batcher: MicroBatcher = field(init=False)
    jobs: JobRunner = field(init=False)
    task_map: TaskMap = field(default_factory=TaskMap)
    _switching: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        """Connect the parts."""
        served, settings = self.served, self.settings
        self.metrics = ServerMetrics(
            served.predictor, settings.max_batch_rows, lambda: self.batcher.queued_rows, settings.max_task_labels
        )
        self.batcher = MicroBatcher(
            served.answer,
            settings.max_batch_rows,
            settings.max_batch_tokens,
            settings.max_wait_ms / 1000,
            settings.max_queue_rows,
            self.metrics.observe_batch,
        )
        self.jobs = JobRunner(
            served.folder,
            settings.max_jobs,
            lambda: served.snapshot,
            self.switch,
            self.metrics.count_job,
            type(served.model.backbone).__module__,
        )

    async def switch(self) -> None:
        """Switch to the tasks in the folder, and overwrite what their predecessors have left in memory."""
        async with self._switching:  # whoever comes second returns when everything is done
            await self._switch()

    async def _switch(self) -> None:
        if await asyncio.to_thread(self.served.is_outdated):
            # Between two batches of the thread that would otherwise keep the lock of the model most of the time.
            await self.batcher.call(self.served.refresh)
            overwrite_free_memory()
            names = {task.name for task in self.served.snapshot.tasks}
            self.metrics.forget(names)
            self.task_map.keep(names)
            logger.info("switched to revision %d of the tasks", self.served.snapshot.revision)

    def record(self, answer: Answer) -> None:
        """Count predictions, and remember the inputs for the map.

        Args:
            answer: Answer with predictions.
        """
        for row in answer.results:
            for prediction in row if isinstance(row, list) else (row,):
                assert isinstance(prediction, Prediction)
                self.metrics.count_prediction(prediction)
            if isinstance(row, Prediction):
                self.task_map.add(row.task, row.instance)

    async def catch_up(self) -> None:
        """Switch to the tasks in the folder if it was changed, so that nothing is answered by outdated ones."""
        if self.batcher.is_alive and self.served.is_touched():
            with suppress(HyperAdaptersError):  # reported by `follow_folder`
                await self.switch()

    async def follow_folder(self) -> None:
        """Switch to the tasks in the folder, and cancel jobs, if another process says so while no requests come."""
        reported = ""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                await self.jobs.follow_requests()
                await self.switch()
                reported = ""
            except HyperAdaptersError as error:
                if str(error) != reported:
                    logger.error("the tasks in the folder cannot be read, and the former ones are served: %s", error)
                reported = str(error)
            except Exception:
                logger.exception("the folder could not be examined")

    async def return_memory(self) -> None:
        """Return free memory to the system from time to time, between two batches."""
        while True:
            await asyncio.sleep(RETURN_SECONDS)
            with suppress(RefusedError):  # the server is being stopped
                await self.batcher.call(return_free_memory)

    async def ask(self, question: Question, timeout_ms: int | None) -> Answer:
        """Answer a question.

        Args:
            question: The question.
            timeout_ms: Deadline in milliseconds. Default: that of the settings.

        Returns:
            The answer.

        Raises:
            DeadlineError: If the answer would be late. Other errors are raised if the question is invalid or refused.
        """
        timeout = (timeout_ms or self.settings.timeout_ms) / 1000
        num_tasks = 1
        if question.tasks is not None:
            num_tasks = len(self.served.snapshot.tasks) if question.tasks == "*" else len(question.tasks)
        try:
            async with asyncio.timeout(timeout):
                answer: Answer = await self.batcher.submit(question, timeout, num_tasks)
            return answer
        except TimeoutError:
            raise DeadlineError("the request could not be answered before its deadline; try again later") from None
