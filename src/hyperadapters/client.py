"""A client of the server (`hyperadapters serve`), with the types of its requests and responses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast
from urllib.parse import quote

from pydantic import ValidationError

from hyperadapters.errors import HyperAdaptersError, TaskError
from hyperadapters.serving.schemas import (
    JobInfo,
    PredictionBody,
    PredictResponse,
    RouteResponse,
    Routing,
    Schema,
    TaskInfo,
    TaskList,
)
from hyperadapters.utils.optional import require

WAIT_SECONDS = 30.0
RETRY_SECONDS = 0.2
"""Time before a request is repeated for the first time. It is doubled each time."""
MAX_PAUSE_SECONDS = 10.0
READING_PATHS = ("/v1/predict", "/v1/route")
"""Paths of requests that change nothing although their method is POST."""
UNAVAILABLE = (429, 503)
PROXY_FAILED = (*UNAVAILABLE, 500, 502, 504)
PROXY_ERROR = "ProxyError"
"""Type of the error if the response is not one of the server."""

_Body = TypeVar("_Body", bound=Schema)


class ServerError(HyperAdaptersError):
    """The server has refused a request or could not answer it.

    Attributes:
        status: Status of the response.
        type: Type of the error, such as "TaskError".
        retry_after: Time in seconds after which the request may be accepted; None if it will not.
    """

    def __init__(self, status: int, type: str, message: str, retry_after: float | None) -> None:  # noqa: A002
        """Store what the response says.

        Args:
            status: Status of the response.
            type: Type of the error.
            message: Message of the error.
            retry_after: Time in seconds after which the request may be accepted.
        """
        super().__init__(message)
        self.status, self.type, self.retry_after = status, type, retry_after


class Client:
    """A client of one server. It can be used as a context manager, which closes its connections.

    A request that changes nothing is repeated if the connection fails, a proxy answers instead of the server, or the
    server refuses it for now. So no prediction is lost if one of several replicas ends.

    All methods raise `ServerError` if the server refuses a request, and the errors of httpx2 if it cannot be reached.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 60.0, retries: int = 3) -> None:
        """Store the address; nothing is sent yet.

        Args:
            url: Address of the server, such as "http://127.0.0.1:8000".
            token: Token of the client. Default: none is sent.
            timeout: Maximum time in seconds that a response may take. Default: 60.
            retries: Maximum number of times that a request which changes nothing is repeated. Default: 3.

        Raises:
            MissingPackageError: If httpx2 is not installed.
        """
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        httpx2 = require("httpx2")
        self._retries = retries
        self._lost = (httpx2.NetworkError, httpx2.RemoteProtocolError)
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self,
        inputs: Iterable[Any],
        task: str | None = None,
        timeout_ms: int | None = None,
        max_error: float | None = None,
    ) -> list[PredictionBody]:
        """Predict the targets of inputs.

        Args:
            inputs: Strings, pairs of strings, or mappings with `text` and optionally `text_pair` and `task`.
            task: Task of all inputs. Default: inputs have their own task, or are routed.
            timeout_ms: Deadline in milliseconds. Default: that of the server.
            max_error: Maximum share of wrong answers of a task. The answer of an input that is not certain enough is
                None. Default: all inputs are answered.

        Returns:
            Predictions in the order of the inputs.
        """
        body = {"inputs": _inputs(inputs), "task": task, "timeout_ms": timeout_ms, "max_error": max_error}
        found = self._send("POST", "/v1/predict", PredictResponse, body)
        return cast(list[PredictionBody], found.predictions)

    def predict_tasks(
        self,
        inputs: Iterable[Any],
        tasks: Sequence[str] | Literal["*"],
        timeout_ms: int | None = None,
        max_error: float | None = None,
    ) -> list[list[PredictionBody]]:
        """Predict the targets of several tasks for each input.

        Args:
            inputs: Inputs as for `predict`, without tasks of their own.
            tasks: Names of the tasks, or "*" for all that read such inputs.
            timeout_ms: Deadline in milliseconds. Default: that of the server.
            max_error: As for `predict`.

        Returns:
            A list of predictions for each input.

        Raises:
            TaskError: If `tasks` is a string other than "*".
        """
        if isinstance(tasks, str) and tasks != "*":
            raise TaskError(f"tasks: expected a list of names, or '*' for all tasks, found {tasks!r}")
        named = tasks if isinstance(tasks, str) else list(tasks)
        body = {"inputs": _inputs(inputs), "tasks": named, "timeout_ms": timeout_ms, "max_error": max_error}
        found = self._send("POST", "/v1/predict", PredictResponse, body)
        return cast(list[list[PredictionBody]], found.predictions)

    def route(self, inputs: Iterable[Any]) -> list[Routing]:
        """Find the tasks of inputs.

        Args:
            inputs: Inputs as for `predict`.

        Returns:
            Results in the order of the inputs.
        """
        return self._send("POST", "/v1/route", RouteResponse, {"inputs": _inputs(inputs)}).routings

    def tasks(self) -> list[TaskInfo]:
        """Return all tasks in the order of their ids."""
        return self._send("GET", "/v1/tasks", TaskList).tasks

    def task(self, name: str) -> TaskInfo:
        """Return a task.

        Args:
            name: Name of the task.

        Returns:
            What is known of the task.
        """
        return self._send("GET", _path(name), TaskInfo)

    def add_task(
        self, name: str, examples: Iterable[Mapping[str, Any]] = (), wait: bool = True, **options: Any
    ) -> JobInfo:
        """Add a task from labelled examples, or from the descriptions of its labels.

        Args:
            name: Name of the task.
            examples: Mappings with `text`, `label` and optionally `text_pair`. Default: none, if `labels` says what the
                labels mean; see `fewshot.add_task.add_task`.
            wait: Whether to wait until the task can be used. Default: True.
            **options: Other fields of `serving.schemas.AddTaskRequest`, such as `labels`, `kind` and `fit`.

        Returns:
            The job; its state is "done" after waiting.

        Raises:
            ServerError: If the request is refused or, after waiting, the task could not be added.
        """
        return self._change("POST", "/v1/tasks", wait, {"name": name, "examples": list(examples), **options})

    def refit_task(
        self, name: str, examples: Iterable[Mapping[str, Any]], wait: bool = True, **options: Any
    ) -> JobInfo:
        """Fit a task to new examples. The arguments, result and errors are those of `add_task`."""
        return self._change("PUT", _path(name), wait, {"examples": list(examples), **options})

    def set_threshold(self, name: str, threshold: float | None, wait: bool = True) -> JobInfo:
        """Set the similarity below which an input routed to a task is declined, or None to decline none.

        The other arguments, the result and the errors are those of `add_task`.
        """
        return self._change("PATCH", _path(name), wait, {"threshold": threshold})

    def remove_task(self, name: str, wait: bool = True) -> JobInfo:
        """Remove a task. The arguments, result and errors are those of `add_task`."""
        return self._change("DELETE", _path(name), wait)

    def job(self, job_id: str, wait: float = 0.0) -> JobInfo:
        """Return the state of a change.

        Args:
            job_id: Identifier of the job.
            wait: Time in seconds for which the server waits for its end. Default: 0.

        Returns:
            The job.
        """
        return self._send("GET", f"/v1/jobs/{job_id}?wait={wait}", JobInfo)

    def cancel_job(self, job_id: str) -> JobInfo:
        """Cancel a change, unless it has been stored already.

        Args:
            job_id: Identifier of the job.

        Returns:
            The job; its state is "done" if the change has been stored already.
        """
        return self._send("DELETE", f"/v1/jobs/{job_id}", JobInfo)

    def _change(self, method: str, path: str, wait: bool, body: Mapping[str, Any] | None = None) -> JobInfo:
        job = self._send(method, path, JobInfo, body)
        while wait and job.state in ("queued", "running"):
            job = self.job(job.id, WAIT_SECONDS)
        if wait and job.state != "done":
            raise ServerError(200, job.state, job.error or f"the change was {job.state}", None)
        return job

    def _send(self, method: str, path: str, body_type: type[_Body], body: Mapping[str, Any] | None = None) -> _Body:
        retries = self._retries if method == "GET" or path in READING_PATHS else 0
        for attempt in range(retries):
            pause = RETRY_SECONDS * 2**attempt
            try:
                return self._request(method, path, body_type, body)
            except self._lost:
                pass
            except ServerError as error:
                if error.status not in (PROXY_FAILED if error.type == PROXY_ERROR else UNAVAILABLE):
                    raise
                pause = max(pause, error.retry_after or 0.0)
            time.sleep(min(pause, MAX_PAUSE_SECONDS))
        return self._request(method, path, body_type, body)

    def _request(self, method: str, path: str, body_type: type[_Body], body: Mapping[str, Any] | None) -> _Body:
        response = self._http.request(method, path, json=body)
        if not response.is_success:
            raise _error_of(response)
        try:
            return body_type.model_validate_json(response.content)
        except ValidationError as error:
            reason = f"expected a response of hyperadapters, found another one; is {self._http.base_url} its address?"
            raise ServerError(response.status_code, PROXY_ERROR, reason, None) from error


def _error_of(response: Any) -> ServerError:
    try:
        error = response.json()["error"]
        name, message = error["type"], error["message"]
    except (ValueError, KeyError, TypeError):  # a proxy has answered
        name, message = PROXY_ERROR, response.text[:200] or f"status {response.status_code}"
    retry_after = response.headers.get("Retry-After", "")  # a proxy may send a date
    return ServerError(response.status_code, name, message, float(retry_after) if retry_after.isdigit() else None)


def _inputs(inputs: Iterable[Any]) -> list[Any]:
    return [
        {"text": row[0], "text_pair": row[1]} if isinstance(row, (tuple, list)) and len(row) == 2 else row
        for row in inputs
    ]


def _path(name: str) -> str:
    return f"/v1/tasks/{quote(name, safe='')}"
