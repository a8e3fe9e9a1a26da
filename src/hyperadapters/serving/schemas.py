"""Bodies of requests and responses. Types are strict: a number is not accepted for a string, nor an unknown key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from hyperadapters.serving.settings import MAX_CHARACTERS, MAX_EXAMPLES, MAX_INPUTS, MAX_NAME, MAX_TIMEOUT_MS

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Action = Literal["add", "refit", "remove", "set_threshold"]


class Schema(BaseModel):
    """Base class of all bodies."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class InputObject(Schema):
    """An input with a second text or a task of its own."""

    text: Text
    text_pair: Text | None = None
    task: Name | None = None


def _form_of(value: object) -> str:
    """Choose the form of an input, so that an error concerns this form only."""
    return "object" if isinstance(value, (dict, InputObject)) else "text"


Input = Annotated[
    Annotated[Text, Tag("text")] | Annotated[InputObject, Tag("object")],
    Discriminator(_form_of),
]
Inputs = Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS)]
TimeoutMs = Annotated[int, Field(ge=1, le=MAX_TIMEOUT_MS)]


class PredictRequest(Schema):
    """Inputs to predict. An input without a task is routed, unless `task` or `tasks` is given."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": ["Where is my parcel?", {"text": "Two hours of fog", "task": "film_sentiment"}]},
                {"inputs": ["Where is my parcel?"], "tasks": "*"},
            ]
        }
    )

    inputs: Inputs
    task: Name | None = Field(None, description="Task of all inputs.")
    tasks: Annotated[list[Name], Field(min_length=1, max_length=MAX_INPUTS)] | Literal["*"] | None = Field(
        None, description="Tasks that are answered for each input, or '*' for all that read such inputs."
    )
    timeout_ms: TimeoutMs | None = Field(None, description="Deadline in milliseconds; default: that of the server.")
    max_error: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Maximum share of wrong answers of a task; the answer of an uncertain input is null."
    )
    include_instances: bool = Field(False, description="Whether to return the instance vectors.")
    record: bool = Field(True, description="Whether the predictions are counted and the inputs shown on the map.")


class RouteRequest(Schema):
    """Inputs to route."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["Where is my parcel?"]}]})

    inputs: Inputs
    timeout_ms: TimeoutMs | None = None


class Candidate(Schema):
    """A task and the similarity of an input to it."""

    task: str
    similarity: float | None


class Routing(Schema):
    """Result of routing an input; see `hyperadapters.inference.routing.RoutingResult`. Infinite values are null."""

    task: str | None
    similarity: float | None
    margin: float | None
    accepted: bool
    candidates: list[Candidate]


class PredictionBody(Schema):
    """Prediction for one input.

    All fields of the answer are null if the input was declined, and `answer` is if it is too uncertain for `max_error`.
    """

    task: str | None = Field(description="Task that was given or chosen by routing.")
    answer: str | float | list[str] | None = Field(description="A list of labels for a multi-label task.")
    probabilities: dict[str, float] | None = Field(description="Probability of each label.")
    text: str | None = Field(description="Generated text of a text-to-text backbone.")
    routing: Routing | None
    instance: list[float] | None = Field(description="Instance vector, if it was asked for.")
    version: int | None = Field(description="Version of the task that answered.")
    digest: str | None = Field(description="SHA-256 of the weights that answered: of the task and of what all share.")


class PredictResponse(Schema):
    """Predictions in the order of the inputs; with `tasks`, a list of predictions for each input."""

    predictions: list[PredictionBody | list[PredictionBody]]


class RouteResponse(Schema):
    """Results of routing in the order of the inputs."""

    routings: list[Routing]


class TaskInfo(Schema):
    """A task of the model."""

    name: str
    kind: Literal["classification", "multi-label", "regression", "text-to-text"]
    labels: list[str]
    fields: list[str]
    version: int
    digest: str
    threshold: float | None = Field(description="Similarity below which a routed input is declined; null if none is.")
    scores: dict[str, float] = Field(description="Test scores by metric, as far as they are known.")
    examples: int | None = Field(description="Number of examples of a task that was added by this server.")
    predictions: int = Field(description="Number of predictions since the server was started.")


class TaskList(Schema):
    """All tasks of the model in the order of their ids."""

    revision: int = Field(description="Number of changes of the tasks so far.")
    can_route: bool = Field(description="Whether inputs without a task can be routed.")
    can_change: bool = Field(description="Whether tasks can be added, fitted again and removed.")
    tasks: list[TaskInfo]


class ExampleRow(Schema):
    """A labelled example: a label, a list of labels, a number or a text as target."""

    text: Text
    text_pair: Text | None = None
    label: str | int | float | Annotated[list[Name], Field(max_length=MAX_EXAMPLES)]


Examples = Annotated[list[ExampleRow], Field(min_length=1, max_length=MAX_EXAMPLES)]


class AddTaskRequest(Schema):
    """A new task with its examples, or with labels whose names or descriptions take their place."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "urgent",
                    "examples": [
                        {"text": "My parcel has to be here today", "label": "yes"},
                        {"text": "Take your time with my order", "label": "no"},
                    ],
                },
                {
                    "name": "refunds",
                    "labels": {
                        "yes": "The customer wants the money back.",
                        "no": "The customer asks about something else.",
                    },
                },
            ]
        }
    )

    name: Name
    kind: Literal["classification", "multi-label", "regression", "text-to-text"] = "classification"
    labels: list[Name] | dict[Name, Text] | None = Field(
        None, description="Labels, or an object of labels and their descriptions; default: labels of the examples."
    )
    template: Annotated[str, Field(max_length=MAX_CHARACTERS)] | None = None
    examples: Annotated[list[ExampleRow], Field(max_length=MAX_EXAMPLES)] = []
    fit: Literal["prototype", "adapter", "none", "head"] | None = Field(
        None, description="Parameters to train; see `HyperAdapterModel.add_task`."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class RefitTaskRequest(Schema):
    """New examples of an existing task."""

    examples: Examples
    fit: Literal["prototype", "adapter", "none", "head"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class ThresholdRequest(Schema):
    """A new threshold of routing."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"threshold": 2.5}]})

    threshold: Annotated[float, Field(ge=-1e30, le=1e30)] | None = Field(
        description="Similarity below which a routed input is declined; null to decline none."
    )


class JobInfo(Schema):
    """A change of a task, which is made in the background."""

    id: str
    action: Action
    task: str
    state: JobState
    stage: str = Field(description="What a running job is doing.")
    seconds: float = Field(description="Time since the job was accepted, until it ended.")
    error: str | None
    report: dict[str, str | int | float | None] | None = Field(description="Result of the fit.")
    version: int | None = Field(description="Version of the task after the change.")


class PrototypeVector(Schema):
    """The prototype of a task, scaled to length 1."""

    task: str
    vector: list[float]


class InputPoint(Schema):
    """A recent input on the map."""

    task: str | None
    x: float
    y: float


class MapResponse(Schema):
    """The directions of prototypes and recent inputs, and their projection to two dimensions."""

    mean: list[float] = Field(description="Mean [p], which is subtracted before a direction is projected.")
    axes: list[list[float]] = Field(description="Orthonormal axes [2, p].")
    prototypes: list[PrototypeVector]
    inputs: list[InputPoint]


class ErrorDetail(Schema):
    """What went wrong."""

    type: str
    message: str


class ErrorBody(Schema):
    """Body of every response with an error status."""

    error: ErrorDetail
