"""The application: its routes and errors."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response

from hyperadapters._version import __version__
from hyperadapters.checkpoints.card import read_scores
from hyperadapters.config import Task, parse
from hyperadapters.errors import DataError, HyperAdaptersError, NotFiniteError, OutputError, TaskError
from hyperadapters.serving.access import HEADERS, RIGHT, Right, SecurityHeaders, TokenCheck, read_tokens
from hyperadapters.serving.batching import DeadlineError, RefusedError
from hyperadapters.serving.responses import error_response, json_response, prediction_bodies, routing_body
from hyperadapters.serving.schemas import (
    AddTaskRequest,
    ErrorBody,
    InputObject,
    JobInfo,
    MapResponse,
    PredictRequest,
    PredictResponse,
    RefitTaskRequest,
    RouteRequest,
    RouteResponse,
    TaskInfo,
    TaskList,
    ThresholdRequest,
)
from hyperadapters.serving.served_model import Answer, Question, ServedModel
from hyperadapters.serving.services import Services
from hyperadapters.serving.settings import ServerSettings
from hyperadapters.serving.worker import Change

MAX_WAIT_SECONDS = 60.0
"""Maximum time for which a request waits for the end of a job."""
STATUS_OF_ERROR = {RefusedError: 503, DeadlineError: 504, NotFiniteError: 500, OutputError: 500}

logger = logging.getLogger(__name__)


def create_app(folder: str | Path, settings: ServerSettings | None = None) -> FastAPI:
    """Create the application that serves the model of a folder.

    Args:
        folder: Folder of the checkpoint, in which changes of tasks are stored.
        settings: Settings of the server. Default: `ServerSettings()`.

    Returns:
        An ASGI application. The model is loaded when the application is started.

    Raises:
        ServingError: If the file of the tokens cannot be read.
    """
    settings = settings or ServerSettings()
    tokens = read_tokens(settings.token_file) if settings.token_file is not None else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served = await asyncio.to_thread(ServedModel, Path(folder), settings.max_batch_rows)
        app.state.services = services = Services(served, settings)
        services.batcher.start(asyncio.get_running_loop())
        services.jobs.start()
        running = [asyncio.create_task(task) for task in (services.follow_folder(), services.return_memory())]
        try:
            yield
        finally:
            for task in running:
                task.cancel()
            await services.jobs.stop(settings.shutdown_seconds)
            await asyncio.to_thread(services.batcher.stop)

    app = FastAPI(
        title="hyperadapters",
        version=__version__,
        summary="Predictions of many tasks by one model, and tasks that change while it serves.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        max_body_size=settings.max_body_bytes,
        telemetry={"logs": False},  # they would contain texts
        responses={
            **{status: {"model": ErrorBody} for status in ("4XX", "5XX")},
            413: {"description": "The body is too large.", "content": {"text/plain": {}}},  # FastAPI's own response
        },
    )
    app.state.settings = settings
    _add_error_handlers(app)
    _add_routes(app)
    _add_page(app)
    if tokens is not None:
        app.add_middleware(TokenCheck, tokens=tokens)
    app.add_middleware(_Observer, state=app.state)
    if settings.is_loopback and not settings.insecure:  # against DNS rebinding
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", settings.host])
    app.add_middleware(SecurityHeaders)
    return app


# Rights

_bearer = HTTPBearer(auto_error=False, description="A token of the server's token file.")


def _may(right: Right) -> Any:
    """Return a dependency that checks the right of a request."""

    async def check(
        request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> None:  # `TokenCheck` has found the right
        if request.app.state.settings.token_file is None:
            return
        found = request.scope.get(RIGHT)
        if found is None or (right == "admin" and found != "admin"):
            raise HTTPException(403, f"the token does not have the right '{right}', which the request requires")

    return Depends(check)


async def _services(request: Request) -> Services:  # otherwise it would be called in another thread
    services: Services = request.app.state.services
    await services.catch_up()
    return services


_Services = Annotated[Services, Depends(_services)]
_Wait = Annotated[
    float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Time in seconds to wait for the end of the job.")
]


# Errors


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HyperAdaptersError)
    async def known(request: Request, error: HyperAdaptersError) -> Response:
        status = STATUS_OF_ERROR.get(type(error), 422)
        headers = {}
        if isinstance(error, RefusedError):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        return error_response(status, type(error).__name__, " ".join(str(error).split()), headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, "HTTPError", str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()[:5]
        places = [".".join(str(part) for part in one["loc"]) for one in found]
        message = "; ".join(f"{place}: {one['msg']}" for place, one in zip(places, found, strict=True))
        return error_response(422, "ValidationError", message)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        message = "the server failed for a reason that its log contains"
        return error_response(500, "InternalError", message, HEADERS)  # outside of the middleware that adds them


class _Observer:
    """ASGI middleware that counts and logs requests."""

    def __init__(self, app: Any, state: Any) -> None:
        self.app, self._state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = perf_counter(), 500

        async def observed(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            self._observe(scope, status, perf_counter() - started)

    def _observe(self, scope: Any, status: int, seconds: float) -> None:
        route, method = getattr(scope.get("route"), "path", "unknown"), _method(scope["method"])
        services = getattr(self._state, "services", None)
        if services is not None:
            services.metrics.requests.labels(route, method, status).inc()
            services.metrics.request_seconds.labels(route).observe(seconds)
        fields = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 2)}
        logger.info("request", extra={"fields": fields})


def _method(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"


# Routes


def _add_routes(app: FastAPI) -> None:
    @app.post("/v1/predict", response_model=PredictResponse, dependencies=[_may("predict")], tags=["predictions"])
    async def predict(body: PredictRequest, services: _Services) -> Response:
        """Predict the targets of inputs; those without a task are routed or declined."""
        if body.task is not None and body.tasks is not None:
            raise TaskError("task and tasks: expected one of them, found both; remove one")
        tasks = tuple(body.tasks) if isinstance(body.tasks, list) else body.tasks
        question = Question(_inputs(body.inputs), body.task, tasks, max_error=body.max_error)
        answer = await _ask(services, question, body.timeout_ms)
        if body.record:
            services.record(answer)
        return json_response(prediction_bodies(answer, body.include_instances))

    @app.post("/v1/route", response_model=RouteResponse, dependencies=[_may("predict")], tags=["predictions"])
    async def route(body: RouteRequest, services: _Services) -> Response:
        """Find the tasks of inputs."""
        answer = await _ask(services, Question(_inputs(body.inputs), only_routes=True), body.timeout_ms)
        return json_response({"routings": [routing_body(found) for found in answer.results]})  # type: ignore[arg-type]

    @app.get("/v1/tasks", response_model=TaskList, dependencies=[_may("predict")], tags=["tasks"])
    async def list_tasks(services: _Services) -> Response:
        """List all tasks."""
        revision = services.served.snapshot.revision
        method = services.served.model.method
        can = {"can_route": method.can_route, "can_change": method.can_change_tasks}
        return json_response({"revision": revision, **can, "tasks": await asyncio.to_thread(_task_infos, services)})

    @app.get("/v1/tasks/{name}", response_model=TaskInfo, dependencies=[_may("predict")], tags=["tasks"])
    async def get_task(name: str, services: _Services) -> Response:
        """Describe a task."""
        _check_known(services, name)
        infos = {info["name"]: info for info in await asyncio.to_thread(_task_infos, services)}
        return json_response(infos[name])

    @app.post("/v1/tasks", status_code=202, response_model=JobInfo, dependencies=[_may("admin")], tags=["tasks"])
    async def add_task(body: AddTaskRequest, services: _Services, wait: _Wait = 0.0) -> Response:
        """Add a task from labelled examples, or from its labels alone."""
        if body.name in services.served.snapshot.versions:
            raise HTTPException(409, f"task '{body.name}' exists; choose another name, or use PUT to fit it again")
        if body.kind != "multi-label" and any(isinstance(row.label, list) for row in body.examples):
            raise DataError("examples: a list of labels is only for tasks of the kind multi-label; give one label")
        if not body.examples and body.kind != "classification":
            raise DataError("examples: expected at least one; only a classification task can do without")
        labels = {*(body.labels or ()), *(row.label for row in body.examples if not isinstance(row.label, list))}
        if body.kind == "classification" and len(labels) < 2:
            raise DataError(
                f"examples: expected at least two labels in the examples or in 'labels', found {len(labels)}; add some "
                "of another label"
            )
        fields = ["text", "text_pair"] if any(row.text_pair is not None for row in body.examples) else ["text"]
        values = {"name": body.name, "kind": body.kind, "fields": fields, "template": body.template}
        task = parse(Task, {**values, "labels": body.labels or []}, TaskError)
        change = Change("add", body.name, task, _rows(body.examples), {"fit": body.fit, "seed": body.seed})
        return await _change(services, change, wait)

    @app.put("/v1/tasks/{name}", status_code=202, response_model=JobInfo, dependencies=[_may("admin")], tags=["tasks"])
    async def refit_task(name: str, body: RefitTaskRequest, services: _Services, wait: _Wait = 0.0) -> Response:
        """Fit a task to new examples."""
        _check_known(services, name)
        options = {"fit": body.fit, "seed": body.seed}
        return await _change(services, Change("refit", name, None, _rows(body.examples), options), wait)

    @app.patch(
        "/v1/tasks/{name}", status_code=202, response_model=JobInfo, dependencies=[_may("admin")], tags=["tasks"]
    )
    async def set_threshold(name: str, body: ThresholdRequest, services: _Services, wait: _Wait = 0.0) -> Response:
        """Set the threshold of routing of a task."""
        _check_known(services, name)
        return await _change(services, Change("set_threshold", name, threshold=body.threshold), wait)

    @app.delete(
        "/v1/tasks/{name}", status_code=202, response_model=JobInfo, dependencies=[_may("admin")], tags=["tasks"]
    )
    async def remove_task(name: str, services: _Services, wait: _Wait = 0.0) -> Response:
        """Remove a task. Nothing of it is left in the folder or in memory afterwards."""
        _check_known(services, name)
        return await _change(services, Change("remove", name), wait)

    @app.get("/v1/jobs/{job_id}", response_model=JobInfo, dependencies=[_may("predict")], tags=["tasks"])
    async def get_job(job_id: str, services: _Services, wait: _Wait = 0.0) -> Response:
        """Show the progress of a change."""
        return json_response(_known_job(job_id, await services.jobs.info(job_id, wait)))

    @app.delete("/v1/jobs/{job_id}", response_model=JobInfo, dependencies=[_may("admin")], tags=["tasks"])
    async def cancel_job(job_id: str, services: _Services) -> Response:
        """Cancel a change, unless it has been stored already."""
        return json_response(_known_job(job_id, await services.jobs.cancel(job_id)))

    @app.get("/v1/map", response_model=MapResponse, dependencies=[_may("predict")], tags=["tasks"])
    async def task_map(services: _Services) -> Response:
        """Return prototypes and recent inputs in two dimensions."""
        return json_response(await asyncio.to_thread(services.task_map.compute, services.served.model))

    @app.get("/metrics", dependencies=[_may("predict")], include_in_schema=False)
    async def metrics(services: _Services) -> Response:
        return Response(services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/live", tags=["probes"])
    async def live() -> dict[str, str]:
        """Tell whether the process answers."""
        return {"status": "live"}

    @app.get("/ready", tags=["probes"])
    async def ready(services: _Services) -> Response:
        """Tell whether predictions are accepted."""
        if not services.batcher.is_alive:
            return error_response(503, "NotReady", "the server is being stopped; send requests to another one")
        return json_response({"status": "ready"})


def _add_page(app: FastAPI) -> None:
    folder = Path(str(files("hyperadapters.serving") / "page"))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(folder / "index.html", media_type="text/html; charset=utf-8")

    app.mount("/page", StaticFiles(directory=folder), name="page")


async def _ask(services: Services, question: Question, timeout_ms: int | None) -> Answer:
    try:
        if services.settings.log_texts:
            logger.info("texts", extra={"fields": {"inputs": question.inputs}})
        return await services.ask(question, timeout_ms)
    except HyperAdaptersError as error:
        known = services.served.snapshot.versions
        task = services.metrics.label(question.task) if question.task and question.task in known else ""
        services.metrics.errors.labels(task, type(error).__name__).inc()
        raise


def _inputs(inputs: list[str | InputObject]) -> list[Any]:
    return [row if isinstance(row, str) else row.model_dump(exclude_none=True) for row in inputs]


def _rows(examples: Any) -> list[dict[str, Any]]:
    return [row.model_dump(exclude_none=True) for row in examples]


def _task_infos(services: Services) -> list[dict[str, Any]]:
    snapshot, scores = services.served.snapshot, read_scores(services.served.folder)
    examples = services.jobs.examples()
    return [
        {
            "name": task.name,
            "kind": task.kind,
            "labels": task.labels,
            "fields": task.fields,
            "version": snapshot.versions[task.name],
            "digest": snapshot.digests[task.name],
            "threshold": snapshot.thresholds.get(task.name),
            "scores": scores.get(task.name, {}).get("test", {}),
            "examples": examples.get(task.name),
            "predictions": services.metrics.predictions_of(task.name),
        }
        for task in snapshot.tasks
    ]


def _check_known(services: Services, name: str) -> None:
    if name not in services.served.snapshot.versions:
        raise HTTPException(404, f"there is no task '{name}'; GET /v1/tasks lists all of them")


def _known_job(job_id: str, info: JobInfo | None) -> JobInfo:
    if info is None:
        raise HTTPException(404, f"there is no job '{job_id}'; the oldest jobs are forgotten")
    return info


async def _change(services: Services, change: Change, wait: float) -> Response:
    services.served.model.method.check_can_change_tasks()
    job_id = await services.jobs.submit(change)
    info = _known_job(job_id, await services.jobs.info(job_id, wait))
    return json_response(info, 202, {"Location": f"/v1/jobs/{job_id}"})
