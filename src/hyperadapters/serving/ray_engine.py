"""The server as a deployment of Ray Serve: several replicas behind one address, on one machine or many."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hyperadapters.checkpoints.format import stored_digest
from hyperadapters.errors import ServingError
from hyperadapters.serving.access import read_tokens
from hyperadapters.serving.app import create_app
from hyperadapters.serving.logs import configure_logs
from hyperadapters.serving.memory import use_one_arena
from hyperadapters.serving.settings import ServerSettings
from hyperadapters.utils.ray_cluster import start_ray

NAME = "hyperadapters"


def serve_with_ray(folder: Path, settings: ServerSettings, replicas: int, tell: Callable[[str], None]) -> None:
    """Serve a model with several replicas until the process gets SIGTERM or SIGINT.

    Every replica is the same application with a model of its own. The tasks of all of them follow the folder, which all
    machines of the cluster must see under the same path.

    Args:
        folder: Folder of the checkpoint.
        settings: Settings of each replica.
        replicas: Number of replicas. Each of them occupies one CPU core of the cluster.
        tell: Function that is called with the address as soon as all replicas answer.

    Raises:
        ServingError: If the port is 0 or taken, the token file is invalid, Ray Serve runs on the cluster already, the
            cluster has too few CPU cores, or the replicas cannot be started.
        CheckpointError: If the checkpoint is missing or damaged.
        MissingPackageError: If Ray is not installed.
        ClusterError: If the cluster cannot be reached or started.
    """
    if settings.port == 0:
        raise ServingError("port: expected a number of 1 or more with Ray, found 0; choose a port")
    folder = folder.resolve()
    if settings.token_file is not None:
        token_file = settings.token_file.resolve()
        read_tokens(token_file)
        settings = replace(settings, token_file=token_file)
    stored_digest(folder)  # before anything is started
    _check_port(settings)
    ended = threading.Event()
    with start_ray() as ray:
        from ray import serve
        from ray.exceptions import RayError

        check_alone(ray)
        deployment = _deployment(serve, folder, settings, replicas, resources_of_replicas(ray, replicas))
        # The application has deadlines of its own.
        http_options = {"host": settings.host, "port": settings.port, "request_timeout_s": None}
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        try:
            serve.start(http_options=http_options, logging_config=quiet)
            serve.run(deployment.bind(), name=NAME, route_prefix="/", logging_config=quiet)
        except (RayError, RuntimeError, OSError) as error:
            serve.shutdown()
            reason = str(error).strip().splitlines()[-1]
            raise ServingError(f"the replicas cannot be started: {reason}; the logs of Ray Serve say why") from None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        tell(f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}")
        ended.wait()
        serve.shutdown()


def _check_port(settings: ServerSettings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            where = f"port {settings.port} of {settings.host}"
            raise ServingError(f"{where} cannot be used: {error}; choose another one") from None


def check_alone(ray: ModuleType) -> None:
    """Refuse a cluster with other applications, which would share the address, and be ended with this one.

    Args:
        ray: The module `ray`, connected to the cluster.

    Raises:
        ServingError: If Ray Serve runs on the cluster.
    """
    if any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise ServingError(
            "Ray Serve runs on the cluster already, with an address and applications of its own; stop it with 'serve "
            "shutdown', or use another cluster"
        )


def resources_of_replicas(ray: ModuleType, replicas: int) -> dict[str, float]:
    """Return what each replica occupies of a cluster.

    Args:
        ray: The module `ray`, connected to the cluster.
        replicas: Number of replicas.

    Returns:
        Options of Ray for the process of a replica: one CPU core and, if the cluster has any, its part of the GPUs.

    Raises:
        ServingError: If the cluster has fewer CPU cores than replicas.
    """
    found = ray.cluster_resources()
    if found.get("CPU", 0) < replicas:
        raise ServingError(
            f"replicas: expected at most one for each CPU core of the cluster, found {replicas} for "
            f"{found.get('CPU', 0):g} cores; choose fewer replicas"
        )
    gpus = found.get("GPU", 0)
    return {"num_cpus": 1, **({"num_gpus": min(1.0, gpus / replicas)} if gpus else {})}


def _deployment(
    serve: ModuleType, folder: Path, settings: ServerSettings, replicas: int, resources: dict[str, float]
) -> Any:
    """Return the deployment. The queue of each replica is that of the application, which says when it is full."""

    def build() -> Any:
        configure_logs()
        use_one_arena()
        return create_app(folder, settings)

    class Replica:
        """The application, which Ray Serve calls."""

    return serve.deployment(
        name="server",
        num_replicas=replicas,
        max_ongoing_requests=settings.max_queue_rows,
        graceful_shutdown_timeout_s=settings.shutdown_seconds,
        ray_actor_options=resources,
    )(serve.ingress(build)(Replica))
