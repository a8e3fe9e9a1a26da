"""Metrics of the server in the format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.inference.routing import RoutingResult
from hyperadapters.serving.batching import BatchTimes
from hyperadapters.serving.jobs import Job
from hyperadapters.serving.served_model import Answer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
FILLS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
OTHER = "other"


class ServerMetrics:
    """Counters and histograms of one server.

    Attributes:
        requests: Requests by route, method and status.
        predictions: Predictions by task.
        declined: Inputs that were declined, by the most similar task.
        errors: Errors of the users and of the server by task, "" if no task was named.
        request_seconds: Duration of requests by route.
        jobs: Ended changes of tasks by action and state.
        task_seconds: Time of questions in the queue, of tokenisation and of the model, by task and phase. The times of
            questions and batches of several tasks are divided by the numbers of their answers.
        cache: Batches that found the adapter of a task in the cache, or for which it was generated.
    """

    def __init__(self, predictor: Predictor, max_rows: int, queued: Callable[[], int], max_task_labels: int) -> None:
        """Create the metrics.

        Args:
            predictor: Predictor of the model, whose times and cache are shown.
            max_rows: Maximum number of inputs in a batch, by which its fill is measured.
            queued: Function that returns the number of inputs that wait.
            max_task_labels: Maximum number of task names in labels.
        """
        self._registry, self._max_rows, self._max_task_labels = CollectorRegistry(), max_rows, max_task_labels
        self._predictor, self._measured = predictor, (0.0, 0.0)
        self._tasks: set[str] = set()
        self._counts: dict[str, int] = {}
        self.requests = self._counter("requests", "Requests.", "route", "method", "status")
        self.predictions = self._counter("predictions", "Predictions.", "task")
        self.declined = self._counter("declined", "Inputs that were declined.", "task")
        self.errors = self._counter("errors", "Questions that could not be answered.", "task", "type")
        self.jobs = self._counter("jobs", "Ended changes of tasks.", "action", "state")
        self.request_seconds = self._histogram("request_seconds", "Duration of requests.", SECONDS, "route")
        self.task_seconds = self._counter("task_seconds", "Time for the inputs of a task.", "task", "phase")
        self.cache = self._counter("adapter_cache", "Batches that needed the adapter of a task.", "task", "result")
        self._queue = self._histogram("queue_seconds", "Time that questions waited.", SECONDS)
        self._batch = self._histogram("batch_seconds", "Duration of batches.", SECONDS)
        self._fill = self._histogram("batch_fill", "Inputs of a batch divided by the maximum.", FILLS)
        for name, text, function in (
            ("queued_rows", "Inputs that wait.", queued),
            ("tokenization_seconds", "Time for tokenisation.", lambda: predictor.tokenization_seconds),
            ("inference_seconds", "Time for the model.", lambda: predictor.inference_seconds),
            ("tasks", "Tasks of the model.", lambda: len(predictor.model.tasks)),
            ("tasks_revision", "Changes of the tasks.", lambda: predictor.model.task_table.revision),
        ):
            Gauge(f"hyperadapters_{name}", text, registry=self._registry).set_function(function)

    def _counter(self, name: str, text: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"hyperadapters_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"hyperadapters_{name}", text, labels, buckets=buckets, registry=self._registry)

    def observe_batch(self, times: BatchTimes) -> None:
        """Count a batch.

        Args:
            times: What was measured for it.
        """
        for seconds in times.queue:
            self._queue.observe(seconds)
        self._batch.observe(times.seconds)
        self._fill.observe(min(1.0, times.rows / self._max_rows))
        self._observe_tasks(times)

    def _observe_tasks(self, times: BatchTimes) -> None:
        """Divide the times of a batch among its tasks, and count what was cached."""
        counts = [_answers_by_task(answer) for answer in times.answers]
        for seconds, count in zip(times.queue, counts, strict=True):
            self._share("queue", seconds, count)
        measured = self._predictor.tokenization_seconds, self._predictor.inference_seconds
        total = sum(counts, Counter())
        for phase, now, before in zip(("tokenization", "inference"), measured, self._measured, strict=True):
            self._share(phase, now - before, total)
        self._measured, cache = measured, self._predictor.adapter_cache
        for result, found in (("hit", cache.hits), ("miss", cache.misses)):
            for task, number in found.items():
                self.cache.labels(self.label(task), result).inc(number)
            found.clear()

    def _share(self, phase: str, seconds: float, count: Counter[str]) -> None:
        for task, number in count.items():
            self.task_seconds.labels(self.label(task), phase).inc(seconds * number / count.total())

    def count_prediction(self, prediction: Prediction) -> None:
        """Count a prediction, or an input that was declined.

        Args:
            prediction: The prediction.
        """
        task, routing = prediction.task, prediction.routing
        if task is None:
            assert routing is not None
            self.declined.labels(self.label(routing.candidates[0].task)).inc()
        else:
            self._counts[task] = self._counts.get(task, 0) + 1
            self.predictions.labels(self.label(task)).inc()

    def count_job(self, job: Job) -> None:
        """Count a change of a task.

        Args:
            job: A job that has ended.
        """
        self.jobs.labels(job.change.action, job.state).inc()

    def predictions_of(self, task: str) -> int:
        """Return the number of predictions of a task since the server was started.

        Args:
            task: Name of the task.
        """
        return self._counts.get(task, 0)

    def label(self, task: str) -> str:
        """Return the name of a task for a label, or "other" if there are too many names.

        Args:
            task: Name of the task.
        """
        if task not in self._tasks and len(self._tasks) >= self._max_task_labels:
            return OTHER
        self._tasks.add(task)
        return task

    def forget(self, tasks: set[str]) -> None:
        """Remove the names of tasks that do not exist any more.

        Args:
            tasks: Names of all tasks of the model.
        """
        for name in [*self._counts.keys() - tasks]:
            del self._counts[name]
        for name in [*self._tasks - tasks]:
            self._tasks.discard(name)
            self.predictions.remove_by_labels({"task": name})
            self.declined.remove_by_labels({"task": name})
            self.errors.remove_by_labels({"task": name})
            self.task_seconds.remove_by_labels({"task": name})
            self.cache.remove_by_labels({"task": name})

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


def _answers_by_task(answer: Answer | Exception) -> Counter[str]:
    """Count the answers by task; an input that is declined or only routed counts for the most similar task."""
    found: Counter[str] = Counter()
    if isinstance(answer, Exception):
        return found
    for row in answer.results:
        for result in row if isinstance(row, list) else (row,):
            routing = result if isinstance(result, RoutingResult) else result.routing
            task = result.task
            if task is None and routing is not None and routing.candidates:
                task = routing.candidates[0].task
            if task is not None:
                found[task] += 1
    return found
