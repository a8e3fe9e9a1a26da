"""Who may do what: tokens and their rights, and headers that protect the page."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from starlette.datastructures import Headers, MutableHeaders

from hyperadapters.errors import ServingError
from hyperadapters.serving.responses import error_response

Right = Literal["predict", "admin"]
RIGHTS = ("predict", "admin")
MIN_TOKEN_LENGTH = 16
PROTECTED = ("/v1/", "/metrics")
"""Beginnings of the paths that require a token."""
RIGHT = "hyperadapters.right"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def read_tokens(path: Path) -> dict[bytes, Right]:
    """Read the tokens of the clients.

    Each line of the file consists of a right and a token, separated by a space. A client with the right "predict" may
    predict, route, and read tasks and metrics; one with the right "admin" may also change tasks. Empty lines and lines
    that begin with "#" are ignored.

    Args:
        path: The file.

    Returns:
        Right of each token, by its SHA-256. The tokens themselves are not kept.

    Raises:
        ServingError: If the file cannot be read, has no tokens, or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"{path}: the tokens cannot be read: {error}") from None
    tokens: dict[bytes, Right] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        right, _, token = line.strip().partition(" ")
        token = token.strip()
        if right not in RIGHTS or len(token) < MIN_TOKEN_LENGTH or not token.isascii() or " " in token:
            raise ServingError(
                f"{path}, line {number}: expected 'predict' or 'admin' and a token of at least {MIN_TOKEN_LENGTH} "
                "ASCII characters, separated by a space"
            )
        tokens[_digest(token)] = right  # type: ignore[assignment]
    if not tokens:
        raise ServingError(f"{path}: expected at least one token, found none; write a line such as 'admin TOKEN'")
    return tokens


def right_of(token: str, tokens: Mapping[bytes, Right]) -> Right | None:
    """Return the right of a token, in a time that does not depend on the token.

    Args:
        token: Token of a request.
        tokens: Result of `read_tokens`.

    Returns:
        The right; None if the token is unknown.
    """
    digest, found = _digest(token), None
    for known, right in tokens.items():
        if hmac.compare_digest(known, digest):
            found = right
    return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class TokenCheck:
    """ASGI middleware that refuses requests without a known token before anything of their bodies is read.

    The right of a request is stored in its scope under `RIGHT`.
    """

    def __init__(self, app: Any, tokens: Mapping[bytes, Right]) -> None:
        """Store the application that is wrapped.

        Args:
            app: The application.
            tokens: Result of `read_tokens`.
        """
        self.app, self._tokens = app, tokens

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request.

        Args:
            scope: Scope of the connection.
            receive: Function that returns the next message of the client.
            send: Function that sends a message to the client.
        """
        if scope["type"] == "http" and scope["path"].startswith(PROTECTED):
            scheme, _, token = Headers(scope=scope).get("Authorization", "").partition(" ")
            right = right_of(token.strip(), self._tokens) if scheme.lower() == "bearer" else None
            if right is None:
                message = "expected the header Authorization: Bearer TOKEN with a token of the server's token file"
                response = error_response(401, "HTTPError", message, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
            scope[RIGHT] = right
        await self.app(scope, receive, send)


class SecurityHeaders:
    """ASGI middleware that adds `HEADERS` to every response."""

    def __init__(self, app: Any) -> None:
        """Store the application that is wrapped.

        Args:
            app: The application.
        """
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request.

        Args:
            scope: Scope of the connection.
            receive: Function that returns the next message of the client.
            send: Function that sends a message to the client.
        """

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
