"""Connection to a Ray cluster, which is started on this machine if there is none."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from hyperadapters.errors import ClusterError
from hyperadapters.utils.optional import require

CONNECT_SECONDS = 10
"""Time in which a cluster has to accept a connection. Ray itself tries for minutes."""


@contextmanager
def start_ray() -> Iterator[ModuleType]:
    """Connect to the Ray cluster at RAY_ADDRESS, or start one on this machine.

    Usage statistics are only sent if RAY_USAGE_STATS_ENABLED is 1. A connection that this process has already is used
    and kept open. Any other one is closed at the end, and a cluster that was started here is shut down with it.

    Yields:
        The module `ray`.

    Raises:
        MissingPackageError: If Ray is not installed.
        ClusterError: If the cluster cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray")
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        _check_address(address)
        options = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            ray.init(address=address, **options)
        else:  # also if another cluster runs on this machine
            ray.init(address="local", include_dashboard=False, **options)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"of RAY_ADDRESS={address}" if address else "on this machine"
        raise ClusterError(
            f"the Ray cluster {where} cannot be reached or started: {error}; if it has token authentication, set "
            "RAY_AUTH_MODE=token"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise OSError if nothing accepts connections at an address; names such as "auto" are left to Ray."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
