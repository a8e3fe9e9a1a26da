"""Conversion of answers to the bodies of responses."""

from __future__ import annotations

from math import isfinite
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from hyperadapters.inference.predictor import Prediction
from hyperadapters.inference.routing import RoutingResult
from hyperadapters.serving.served_model import Answer


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with a body in JSON, in which numbers that are not finite are null.

    Args:
        body: Body of the response.
        status: Status of the response.
        headers: Headers of the response.
    """
    return Response(to_json(body, inf_nan_mode="null"), status, headers, "application/json")


def error_response(status: int, name: str, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return a response in the form of `schemas.ErrorBody`.

    Args:
        status: Status of the response.
        name: Type of the error.
        message: What was expected, what was found and what to do.
        headers: Headers of the response.
    """
    safe = message.encode("utf-8", "backslashreplace").decode()  # a message may quote a lone surrogate
    return json_response({"error": {"type": name, "message": safe}}, status, headers)


def prediction_bodies(answer: Answer, with_instances: bool) -> dict[str, Any]:
    """Return the body of `schemas.PredictResponse`.

    Args:
        answer: Answer with predictions.
        with_instances: Whether the body contains the instance vectors.
    """

    def body(prediction: Prediction) -> dict[str, Any]:
        task = prediction.task
        return {
            "task": task,
            "answer": prediction.answer,
            "probabilities": prediction.probabilities,
            "text": prediction.text,
            "routing": routing_body(prediction.routing),
            "instance": prediction.instance if with_instances else None,
            "version": None if task is None else answer.versions[task],
            "digest": None if task is None else answer.digests[task],
        }

    return {"predictions": [list(map(body, row)) if isinstance(row, list) else body(row) for row in answer.results]}  # type: ignore[arg-type]


def routing_body(routing: RoutingResult | None) -> dict[str, Any] | None:
    """Return the body of `schemas.Routing`.

    Args:
        routing: Result of routing; None if the method cannot route.
    """
    if routing is None:
        return None
    return {
        "task": routing.task,
        "similarity": routing.similarity,
        "margin": routing.margin if isfinite(routing.margin) else None,
        "accepted": routing.accepted,
        "candidates": [{"task": one.task, "similarity": one.similarity} for one in routing.candidates],
    }
