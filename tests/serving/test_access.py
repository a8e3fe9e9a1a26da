"""Who may do what: tokens and rights, hosts, headers, and servers that do not start."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving_helpers import ADDRESS, EXAMPLES
from starlette.testclient import TestClient

from hyperadapters.errors import ServingError
from hyperadapters.serving.access import HEADERS, read_tokens, right_of
from hyperadapters.serving.app import create_app
from hyperadapters.serving.settings import ServerSettings

READER, ADMIN = "reader-token-0123456789", "admin-token-0123456789"
QUESTION = {"inputs": ["w1"]}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.txt"
    path.write_text(f"# clients\n\npredict {READER}\nadmin {ADMIN}\n")
    return path


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_token_gives_its_right_and_no_other(run_folder: Path, token_file: Path) -> None:
    settings = ServerSettings(token_file=token_file)
    with TestClient(create_app(run_folder, settings), base_url=ADDRESS) as client:
        change = {"name": "new", "labels": ["a", "b"], "examples": EXAMPLES}
        for headers in ({}, bearer("wrong"), bearer(READER[:-1]), {"Authorization": f"Basic {READER}"}):
            refused = client.post("/v1/predict", json=QUESTION, headers=headers)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert client.post("/v1/tasks", json=change, headers=headers).status_code == 401
            for path in ("/v1/tasks", "/v1/map", "/metrics"):
                assert client.get(path, headers=headers).status_code == 401
        for path in ("/live", "/ready", "/", "/openapi.json"):
            assert client.get(path).status_code == 200
        for token in (READER, ADMIN):
            assert client.post("/v1/predict", json=QUESTION, headers=bearer(token)).status_code == 200
            assert client.get("/metrics", headers=bearer(token)).status_code == 200
        assert client.post("/v1/tasks", json=change, headers=bearer(READER)).status_code == 403
        assert client.delete("/v1/tasks/mood", headers=bearer(READER)).status_code == 403
        assert client.patch("/v1/tasks/unknown", json={"threshold": 1.0}, headers=bearer(ADMIN)).status_code == 404


def test_nothing_of_a_body_is_read_before_the_token_is_checked(run_folder: Path, token_file: Path) -> None:
    settings = ServerSettings(token_file=token_file, max_body_bytes=100)
    with TestClient(create_app(run_folder, settings), base_url=ADDRESS) as client:
        for body, status in ((b"{", 401), (b"x" * 1000, 413)):
            assert client.post("/v1/predict", content=body).status_code == status
            assert client.post("/v1/predict", content=body, headers=bearer(READER)).status_code in (413, 422)


def test_tokens_are_kept_as_digests_only(token_file: Path) -> None:
    tokens = read_tokens(token_file)
    assert right_of(READER, tokens) == "predict"
    assert right_of(ADMIN, tokens) == "admin"
    assert right_of("", tokens) is None
    assert not any(READER.encode() in digest for digest in tokens)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "at least one token"),
        ("# nothing\n", "at least one token"),
        ("admin short\n", "line 1: expected 'predict' or 'admin'"),
        ("predict reader-token-0123456789\nroot root-token-0123456789\n", "line 2"),
        ("admin two-words-0123456789 more\n", "line 1"),
        ("admin-token-0123456789\n", "line 1"),
    ],
)
def test_a_wrong_token_file_is_refused(tmp_path: Path, contents: str, message: str) -> None:
    path = tmp_path / "tokens.txt"
    path.write_text(contents)
    with pytest.raises(ServingError, match=message):
        read_tokens(path)
    with pytest.raises(ServingError, match="cannot be read"):
        read_tokens(tmp_path / "missing.txt")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_a_server_that_strangers_reach_needs_tokens_or_consent(host: str, token_file: Path) -> None:
    with pytest.raises(ServingError, match="--token-file"):
        ServerSettings(host=host)
    assert not ServerSettings(host=host, token_file=token_file).is_loopback
    assert ServerSettings(host=host, insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_for_this_machine_needs_none(host: str) -> None:
    assert ServerSettings(host=host).is_loopback


@pytest.mark.parametrize(
    "setting", ["max_batch_rows", "max_batch_tokens", "max_queue_rows", "timeout_ms", "max_body_bytes", "max_jobs"]
)
def test_a_setting_that_is_too_small_is_refused(setting: str) -> None:
    with pytest.raises(ServingError, match=setting):
        ServerSettings(**{setting: 0})


def test_other_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ServingError, match="port"):
        ServerSettings(port=65536)
    with pytest.raises(ServingError, match="max_wait_ms"):
        ServerSettings(max_wait_ms=-1)


def test_every_response_has_headers_that_protect_the_page(client: TestClient) -> None:
    for path in ("/", "/v1/tasks", "/unknown", "/page/app.js"):
        headers = client.get(path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert not any(name.startswith("access-control") for name in headers)
    refused = client.options(
        "/v1/predict", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert not any(name.startswith("access-control") for name in refused.headers)


def test_a_request_under_another_name_of_the_host_is_refused(client: TestClient) -> None:
    refused = client.get("/v1/tasks", headers={"Host": "evil.example"})
    assert refused.status_code == 400
    assert {name: refused.headers[name] for name in HEADERS} == HEADERS
    assert client.get("/v1/tasks", headers={"Host": "localhost:8000"}).status_code == 200


def test_the_loopback_address_of_ipv6_is_a_name_of_the_host(run_folder: Path) -> None:
    with TestClient(create_app(run_folder, ServerSettings(host="::1")), base_url="http://[::1]:8000") as client:
        assert client.get("/live").status_code == 200
        assert client.get("/live", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/..%2f..%2fcli.py"]
)
def test_no_path_leaves_the_folder_of_the_page(client: TestClient, path: str) -> None:
    assert client.get(f"/page/{path}").status_code == 404


def test_an_error_of_the_server_shows_no_trace_and_is_not_the_end(client: TestClient) -> None:
    served = client.app.state.services.served  # type: ignore[attr-defined]
    predictor, served.predictor = served.predictor, None
    response = client.post("/v1/predict", json=QUESTION)
    assert response.status_code == 500
    assert response.json()["error"] == {
        "type": "InternalError",
        "message": "the server failed for a reason that its log contains",
    }
    served.predictor = predictor
    assert client.post("/v1/predict", json=QUESTION).status_code == 200
