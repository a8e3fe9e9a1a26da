"""The connection to Ray: which cluster it is to, who closes it, and what is said if there is none."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hyperadapters.errors import ClusterError
from hyperadapters.utils.ray_cluster import start_ray

ray = pytest.importorskip("ray")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of a Ray that is never started."""
    found: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: found.append(f"init {options['include_dashboard']}"))
    monkeypatch.setattr(ray, "shutdown", lambda: found.append("shutdown"))
    return found


def test_what_was_started_is_shut_down_also_after_an_error(calls: list[str]) -> None:
    with start_ray() as module:
        assert module is ray
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert calls == ["init False", "shutdown"]
    with pytest.raises(ZeroDivisionError), start_ray():
        raise ZeroDivisionError
    calls = calls[2:]
    assert calls == ["init False", "shutdown"]


def test_usage_statistics_can_be_switched_on(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with start_ray():
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_a_connection_of_the_process_is_kept(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with start_ray():
        pass
    assert calls == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "the Ray cluster of RAY_ADDRESS=127.0.0.1:1 cannot be reached or started: .*refused"),
        ("ray://[::1]:1", r"RAY_ADDRESS=ray://\[::1\]:1 cannot be reached or started: "),
        ("auto", "the Ray cluster of RAY_ADDRESS=auto cannot be reached or started: no answer"),
        ("", "the Ray cluster on this machine cannot be reached or started: no answer"),
    ],
)
def test_a_cluster_that_is_not_there_is_an_error(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    def fail(**_: Any) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ClusterError, match=message), start_ray():
        pass
