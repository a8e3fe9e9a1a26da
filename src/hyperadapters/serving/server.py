"""The process of the server."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from hyperadapters.checkpoints.format import stored_digest
from hyperadapters.errors import ServingError
from hyperadapters.serving.app import create_app
from hyperadapters.serving.logs import configure_logs
from hyperadapters.serving.memory import use_one_arena
from hyperadapters.serving.settings import ServerSettings

KEEP_ALIVE_SECONDS = 75
"""Time for which an unused connection is kept. It is longer than that of most proxies, which close it first then."""


class _Server(uvicorn.Server):
    """A server that tells its address."""

    def __init__(self, config: uvicorn.Config, tell: Callable[[str], None]) -> None:
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            host, port = server.sockets[0].getsockname()[:2]
            self._tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            break


def serve(folder: Path, settings: ServerSettings, tell: Callable[[str], None]) -> None:
    """Serve a model until the process gets SIGTERM or SIGINT.

    Args:
        folder: Folder of the checkpoint.
        settings: Settings of the server.
        tell: Function that is called with the address as soon as the server answers.

    Raises:
        ServingError: If the settings are invalid, or another program uses the port.
        CheckpointError: If the checkpoint is missing or damaged, or belongs to another backbone.
    """
    stored_digest(folder)  # before anything is started
    _check_address(settings)
    configure_logs()
    use_one_arena()
    config = uvicorn.Config(
        create_app(folder, settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_seconds),
    )
    _Server(config, tell).run()


def _check_address(settings: ServerSettings) -> None:
    """Check that the server can listen, before the model is loaded."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        raise ServingError(
            f"{settings.host}, port {settings.port}: cannot be listened to: {error.strerror}; choose another port with "
            "--port (0: any free one), or another address with --host"
        ) from None
