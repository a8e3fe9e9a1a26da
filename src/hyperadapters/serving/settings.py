"""Settings of the server and the limits of its requests."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from hyperadapters.errors import ServingError

MAX_INPUTS = 1024
"""Maximum number of inputs in a request."""
MAX_CHARACTERS = 100_000
"""Maximum number of characters of a text."""
MAX_NAME = 200
"""Maximum number of characters of the name of a task or a label."""
MAX_EXAMPLES = 10_000
"""Maximum number of examples of a new task."""
MAX_TIMEOUT_MS = 600_000
"""Maximum deadline of a request in milliseconds."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server.

    Attributes:
        host: Address on which the server listens.
        port: Port on which the server listens; 0 for any free port.
        token_file: File with the tokens of the clients, see `access.read_tokens`; None for a server without tokens.
        insecure: Whether a server without tokens may listen on another address than a loopback one.
        max_batch_rows: Maximum number of inputs that are answered together. A larger request is a batch of its own.
        max_batch_tokens: Maximum number of tokens that are answered together, estimated from the numbers of characters.
        max_wait_ms: Time for which an idle server waits for further requests before it answers the first, in
            milliseconds.
        max_queue_rows: Maximum number of inputs that wait. Further requests are refused with status 503.
        timeout_ms: Deadline of a request that has none of its own, in milliseconds.
        max_body_bytes: Maximum size of the body of a request in bytes.
        max_jobs: Maximum number of changes of tasks that wait.
        max_task_labels: Maximum number of task names in the labels of metrics; further tasks are counted as "other".
        poll_seconds: Interval in seconds in which the folder is examined for tasks that another process has changed.
        shutdown_seconds: Time in seconds that accepted requests have when the server is stopped.
        log_texts: Whether the texts of requests are logged.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    insecure: bool = False
    max_batch_rows: int = 64
    max_batch_tokens: int = 8192
    max_wait_ms: float = 2.0
    max_queue_rows: int = 2048
    timeout_ms: int = 10_000
    max_body_bytes: int = 8 * 2**20
    max_jobs: int = 64
    max_task_labels: int = 100
    poll_seconds: float = 1.0
    shutdown_seconds: float = 30.0
    log_texts: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ServingError: If a number is out of range, or strangers could reach a server without tokens.
        """
        for name in (
            "max_batch_rows",
            "max_batch_tokens",
            "max_queue_rows",
            "timeout_ms",
            "max_body_bytes",
            "max_jobs",
        ):
            if getattr(self, name) < 1:
                raise ServingError(f"{name}: expected a number of 1 or more, found {getattr(self, name)}")
        if not 0 <= self.port < 2**16:
            raise ServingError(f"port: expected a number from 0 to 65535, found {self.port}")
        if self.max_wait_ms < 0:
            raise ServingError(f"max_wait_ms: expected a number of 0 or more, found {self.max_wait_ms}")
        if self.token_file is None and not self.insecure and not self.is_loopback:
            raise ServingError(
                f"host: anyone who reaches {self.host} could read the answers and change the tasks; expected a "
                "loopback address, a token file (--token-file FILE), or your consent (--insecure)"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
