"""Predictions, routing and errors of the server, and what it tells about tasks."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import num_inputs
from helpers import make_method_model, make_model, save_backbone, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_helpers import ADDRESS, TEXTS, ended, write_run
from starlette.testclient import TestClient

from hyperadapters.errors import CheckpointError
from hyperadapters.heads.task_heads import ERROR_LEVELS
from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.serving.app import create_app
from hyperadapters.serving.served_model import task_digests
from hyperadapters.serving.settings import MAX_CHARACTERS, MAX_INPUTS, ServerSettings

MIXED: list[Any] = [
    TEXTS[0],
    {"text": TEXTS[1], "task": "mood"},
    {"text": TEXTS[2], "task": "colour"},
    {"text": TEXTS[3], "task": "size"},
    TEXTS[4],
]

LABELLED = [{"text": "w1 w2", "label": "yes"}, {"text": "w3 w4", "label": "no"}]

NUM_BODIES = num_inputs(150)
"""Number of malformed bodies of each kind; `make fuzz-server` sends 5,000."""


def comparable(prediction: Prediction) -> dict[str, Any]:
    routing = prediction.routing
    assert routing is not None
    return {
        "task": prediction.task,
        "answer": prediction.answer,
        "probabilities": prediction.probabilities,
        "text": prediction.text,
        "routing": {
            "task": routing.task,
            "similarity": routing.similarity,
            "margin": None if math.isinf(routing.margin) else routing.margin,
            "accepted": routing.accepted,
            "candidates": [{"task": one.task, "similarity": one.similarity} for one in routing.candidates],
        },
        "instance": list(prediction.instance or ()),
    }


def without_version(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("version", "digest")}


def test_inputs_with_and_without_tasks_are_answered_in_order_as_by_a_predictor(
    client: TestClient, run_folder: Path
) -> None:
    """Both run the same batch on the same machine, so the numbers are equal bit for bit."""
    response = client.post("/v1/predict", json={"inputs": MIXED, "include_instances": True})
    assert response.status_code == 200
    model = HyperAdapterModel.from_pretrained(run_folder)
    expected = list(Predictor(model)(MIXED))
    found = response.json()["predictions"]
    assert [without_version(body) for body in found] == [comparable(prediction) for prediction in expected]
    digests = task_digests(model)
    for body in found:
        assert (body["version"], body["digest"]) == (
            (None, None) if body["task"] is None else (model.task_table.versions[body["task"]], digests[body["task"]])
        )
    assert len(set(digests.values())) == len(model.tasks)


def test_one_task_or_several_can_be_asked_for_all_inputs(client: TestClient, run_folder: Path) -> None:
    model = HyperAdapterModel.from_pretrained(run_folder)
    one = client.post("/v1/predict", json={"inputs": TEXTS, "task": "colour"}).json()["predictions"]
    assert [body["probabilities"] for body in one] == [p.probabilities for p in Predictor(model)(TEXTS, task="colour")]
    both = client.post("/v1/predict", json={"inputs": TEXTS, "tasks": ["mood", "colour"]}).json()["predictions"]
    expected = list(Predictor(model).predict_tasks(TEXTS, ["mood", "colour"]))
    assert [[body["answer"] for body in row] for row in both] == [[p.answer for p in row] for row in expected]
    every = client.post("/v1/predict", json={"inputs": TEXTS[:1], "tasks": "*"}).json()["predictions"]
    assert [body["task"] for body in every[0]] == ["colour", "size", "mood"]


def test_routing_alone_gives_the_same_tasks_as_predicting(client: TestClient) -> None:
    routed = client.post("/v1/route", json={"inputs": TEXTS}).json()["routings"]
    predicted = client.post("/v1/predict", json={"inputs": TEXTS}).json()["predictions"]
    assert [row["task"] for row in routed] == [row["routing"]["task"] for row in predicted]
    assert any(row["task"] is None for row in routed) or all(row["accepted"] for row in routed)


def test_answers_are_withheld_for_one_request_where_its_maximum_error_is_not_supported(run_folder: Path) -> None:
    model = HyperAdapterModel.from_pretrained(run_folder)
    assert model.heads is not None
    model.heads.error_bounds[model.task_id("mood")] = torch.tensor([[0.0] * ERROR_LEVELS, [0.05] * ERROR_LEVELS])
    model.save_pretrained(run_folder)
    with TestClient(create_app(run_folder), base_url=ADDRESS) as client:
        limited, unlimited, several = (
            client.post("/v1/predict", json={"inputs": TEXTS, **options}).json()["predictions"]
            for options in (
                {"max_error": 0.1, "task": "mood"},
                {"max_error": 0.01, "task": "mood"},
                {"max_error": 0.1, "tasks": ["mood", "colour"]},
            )
        )
    expected = list(Predictor(model, max_error=0.1)(TEXTS, task="mood"))
    assert [body["answer"] for body in limited] == [prediction.answer for prediction in expected]
    assert None not in [body["answer"] for body in limited]
    assert [body["answer"] for body in unlimited] == [None] * len(TEXTS)
    assert [body["probabilities"] for body in unlimited] == [prediction.probabilities for prediction in expected]
    assert [[body["answer"] for body in row] for row in several] == [[body["answer"], None] for body in limited]


def test_an_empty_text_is_declined(client: TestClient) -> None:
    (found,) = client.post("/v1/predict", json={"inputs": [""]}).json()["predictions"]
    assert (found["task"], found["answer"], found["version"], found["routing"]["accepted"]) == (None, None, None, False)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"inputs": []}, 422, "at least 1"),
        ({"inputs": ["a"] * (MAX_INPUTS + 1)}, 422, "at most"),
        ({"inputs": ["a" * (MAX_CHARACTERS + 1)]}, 422, "at most"),
        ({"inputs": [1]}, 422, "valid string"),
        ({"inputs": "a"}, 422, "valid list"),
        ({"inputs": [{"text": "a", "txt": "b"}]}, 422, "not permitted"),
        ({"inputs": ["a"], "task": "mod"}, 422, "Did you mean 'mood'"),
        ({"inputs": [{"text": "a", "task": "mod"}]}, 422, "input 1: Unknown task 'mod'"),
        ({"inputs": ["a"], "task": "mood", "tasks": "*"}, 422, "found both"),
        ({"inputs": ["a"], "tasks": ["mood", "mood"]}, 422, "named twice"),
        ({"inputs": ["a"], "timeout_ms": 0}, 422, "greater than or equal to 1"),
        ({"inputs": ["a"], "timeout_ms": True}, 422, "valid integer"),
        ({"inputs": ["a"], "max_error": 1}, 422, "less than 1"),
        ({"inputs": ["a"], "other": 1}, 422, "not permitted"),
    ],
)
def test_a_wrong_request_is_refused_with_a_message(
    client: TestClient, body: dict[str, Any], status: int, message: str
) -> None:
    response = client.post("/v1/predict", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_a_wrong_input_does_not_concern_other_requests_of_its_batch(run_folder: Path) -> None:
    settings = ServerSettings(max_wait_ms=300)
    with TestClient(create_app(run_folder, settings), base_url=ADDRESS) as client:
        bodies = [{"inputs": [text], "task": "mood"} for text in TEXTS[:3]] + [{"inputs": ["a"], "task": "unknown"}]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda body: client.post("/v1/predict", json=body), bodies))
        assert [response.status_code for response in found] == [200, 200, 200, 422]
        assert [line for line in client.get("/metrics").text.splitlines() if line.startswith("hyperadapters_batch_s")]


@settings(max_examples=NUM_BODIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.one_of(st.binary(max_size=200), st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace"))))
def test_a_body_that_is_not_json_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=NUM_BODIES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=JSON, path=st.sampled_from(["/v1/predict", "/v1/route", "/v1/tasks"]))
def test_any_other_json_is_refused(client: TestClient, body: Any, path: str) -> None:
    response = client.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"inputs": ["\\ud800"]}', b'{"inputs": [' + b'"a",' * 10 + b"]}"])
def test_json_that_breaks_parsers_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500


def test_a_body_that_is_too_large_or_of_another_type_is_refused(run_folder: Path) -> None:
    settings = ServerSettings(max_body_bytes=1000)
    with TestClient(create_app(run_folder, settings), base_url=ADDRESS) as client:
        assert client.post("/v1/predict", json={"inputs": ["a" * 1000]}).status_code == 413
        plain = client.post("/v1/predict", content=b'{"inputs": ["a"]}', headers={"Content-Type": "text/plain"})
        assert plain.status_code == 422


def test_tasks_are_described_with_scores_versions_and_thresholds(client: TestClient, run_folder: Path) -> None:
    (run_folder / "metrics.json").write_text(json.dumps({"tasks": {"mood": {"test": {"accuracy": 0.75}}}}))
    client.post("/v1/predict", json={"inputs": TEXTS[:2], "task": "mood"})
    found = client.get("/v1/tasks").json()["tasks"]
    assert [task["name"] for task in found] == ["colour", "size", "mood"]
    assert found[2]["scores"] == {"accuracy": 0.75}
    assert (found[2]["predictions"], found[2]["threshold"], found[2]["labels"]) == (2, None, ["bad", "good"])
    assert client.get("/v1/tasks/mood").json() == found[2]
    assert client.get("/v1/tasks/unknown").status_code == 404
    assert client.get("/v1/tasks/..%2F..%2Fetc%2Fpasswd").status_code == 404


def test_the_map_has_all_prototypes_and_the_inputs_so_far(client: TestClient) -> None:
    client.post("/v1/predict", json={"inputs": TEXTS})
    found = client.get("/v1/map").json()
    assert [row["task"] for row in found["prototypes"]] == ["colour", "size", "mood"]
    assert len(found["inputs"]) == len(TEXTS)
    client.post("/v1/predict", json={"inputs": TEXTS, "record": False})
    assert client.get("/v1/map").json() == found
    assert all(math.isclose(math.hypot(*row["vector"]), 1, rel_tol=1e-5) for row in found["prototypes"])


TASK_LABELS = ("colour", "size", "other")


def test_metrics_count_predictions_by_task_with_a_bound_on_names(run_folder: Path) -> None:
    settings = ServerSettings(max_task_labels=2)
    with TestClient(create_app(run_folder, settings), base_url=ADDRESS) as client:
        for task in ("colour", "size", "mood", "mood"):
            client.post("/v1/predict", json={"inputs": ["w1"], "task": task})
        client.post("/v1/predict", json={"inputs": ["w1"], "task": "unknown"})
        client.post("/v1/predict", json={"inputs": [""]})
        lines = client.get("/metrics").text.splitlines()
    assert 'hyperadapters_predictions_total{task="colour"} 1.0' in lines
    assert 'hyperadapters_predictions_total{task="other"} 2.0' in lines
    assert any(line.startswith("hyperadapters_declined_total{task=") and line.endswith(" 1.0") for line in lines)
    assert 'hyperadapters_errors_total{task="",type="TaskError"} 1.0' in lines
    names = {line.partition(" ")[0] for line in lines}
    for part in ("queue_seconds_count", "tokenization_seconds", "inference_seconds", "batch_fill_count"):
        assert f"hyperadapters_{part}" in names
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    for phase in ("queue", "tokenization", "inference"):
        for task in TASK_LABELS:
            assert values[f'hyperadapters_task_seconds_total{{phase="{phase}",task="{task}"}}'] > 0
    for phase in ("tokenization", "inference"):  # nothing is counted twice
        by_task = [values[f'hyperadapters_task_seconds_total{{phase="{phase}",task="{t}"}}'] for t in TASK_LABELS]
        assert math.isclose(sum(by_task), values[f"hyperadapters_{phase}_seconds"], rel_tol=1e-9)
    assert values['hyperadapters_adapter_cache_total{result="miss",task="colour"}'] == 1
    assert values['hyperadapters_adapter_cache_total{result="hit",task="other"}'] == 1  # the second input of "mood"


@pytest.mark.slow
def test_a_model_that_generates_answers_and_one_that_cannot_route_are_served(tmp_path: Path) -> None:
    for kind, model in (("t5", make_model("t5")), ("bert", make_method_model("bert", "task_adapter"))):
        model.tokenizer = tiny_tokenizer()
        model.backbone_name = str(save_backbone(tmp_path / f"{kind}-backbone", kind))
        model.save_pretrained(tmp_path / kind)
        with TestClient(create_app(tmp_path / kind), base_url=ADDRESS) as client:
            body = client.post("/v1/predict", json={"inputs": TEXTS[:2], "task": "mood"}).json()["predictions"][0]
            assert body["task"] == "mood"
            assert isinstance(body["text"], str) == (kind == "t5")
            routed = client.post("/v1/route", json={"inputs": ["w1"]})
            assert routed.status_code == (200 if kind == "t5" else 422)
            assert client.get("/v1/tasks").status_code == 200
            assert len(client.get("/v1/map").json()["prototypes"]) == (3 if kind == "t5" else 0)
            assert client.get("/v1/tasks").json()["can_route"] == (kind == "t5")
            added = client.post("/v1/tasks?wait=60", json={"name": "new", "examples": LABELLED})
            assert added.status_code == (202 if kind == "t5" else 422)
            assert kind != "t5" or ended(client, added.json())["state"] == "done"


def test_the_openapi_document_has_every_route_with_examples(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/predict",
        "/v1/route",
        "/v1/tasks",
        "/v1/tasks/{name}",
        "/v1/jobs/{job_id}",
        "/v1/map",
        "/live",
        "/ready",
    }
    for name in ("PredictRequest", "RouteRequest", "AddTaskRequest", "ThresholdRequest"):
        assert document["components"]["schemas"][name]["examples"]


def test_a_folder_without_a_checkpoint_ends_the_start_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"), TestClient(create_app(tmp_path)):
        pass


def test_a_model_of_densities_routes_as_the_library_does(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", preset="plus")
    with TestClient(create_app(folder), base_url=ADDRESS) as client:
        found = client.post("/v1/predict", json={"inputs": TEXTS}).json()["predictions"]
    expected = list(Predictor(HyperAdapterModel.from_pretrained(folder))(TEXTS))
    assert [body["task"] for body in found] == [prediction.task for prediction in expected]
