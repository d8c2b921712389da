"""What stands in front of every route: hosts, origins, keys, and one log line a request. Plain ASGI; knows no dialect.

A web page may not use this server behind its user's back. A page's own requests carry an Origin, which must be
allowed; a page whose name an attacker points at this machine (DNS rebinding) carries that name as Host, so only
names of this machine and bare addresses are answered.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.server.metrics import Metrics, log
from mlx_mtp.server.nouns import ServerError, Settings
from mlx_mtp.server.respond import Json

OPEN_PATHS = ("/health", "/health/live")  # a supervisor has no key
QUIET_PATHS = ("/health", "/health/live", "/metrics")  # asked every few seconds; their successes tell nothing
Render = Callable[[str, ServerError], Any]


class Gate:
    """ASGI middleware: refuses, passes on, and logs what became of it."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, render: Render) -> None:
        """render: the JSON body of an error, by the path it was asked for."""
        self._app, self._settings, self._metrics, self._render = app, settings, metrics, render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, first = time.perf_counter(), 500, ""
        entry: dict[str, Any] = {"id": uuid.uuid4().hex[:12]}
        scope.setdefault("state", {})["log"] = entry

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", entry["id"].encode())]}
            await send(message)

        try:
            self._check(scope)
        except ServerError as error:
            first = error.message
            await error_response(self._render(scope["path"], error), error)(scope, receive, answer)
        else:
            await self._app(scope, receive, answer)
        finally:
            self._note(scope, entry, 499 if entry.pop("gone", False) else status, first, time.perf_counter() - begun)

    def _note(self, scope: Scope, entry: dict[str, Any], status: int, error: str, seconds: float) -> None:
        route = scope.get("route")
        self._metrics.request(route.path if route is not None else "other", status)
        head = {"time": round(time.time(), 3), "id": entry.pop("id"), "method": scope["method"], "path": scope["path"]}
        tail = {"error": error} if error else {}
        if scope["path"] not in QUIET_PATHS or status >= 500:
            log({**head, "status": status, "seconds": round(seconds, 4), **entry, **tail})

    def _check(self, scope: Scope) -> None:
        """Raises ServerError: 403 for a foreign host or origin, 401 without the key."""
        headers, settings = Headers(scope=scope), self._settings
        host = headers.get("host", "")
        if host and not _is_own(_name(f"//{host}"), settings.hosts):
            raise ServerError(403, "host_not_allowed", f"the host {host[:200]!r} is foreign; see --allow-host")
        origin = headers.get("origin")
        if origin is not None and not _may_call(origin, settings.origins):
            raise ServerError(403, "origin_not_allowed", f"the origin {origin[:200]!r} is foreign; see --cors-origin")
        asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if settings.api_key is not None and scope["path"] not in OPEN_PATHS and not asks:
            self._check_key(headers, settings.api_key)

    def _check_key(self, headers: Headers, key: str) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # The same time for every wrong key. Headers are bytes, which starlette reads as Latin-1.
        if not hmac.compare_digest(given.encode("latin-1"), key.encode("utf-8", "replace")):
            raise ServerError(401, "invalid_api_key", "no valid API key: give it as Authorization: Bearer or x-api-key")


def error_response(body: Any, error: ServerError) -> Json:
    """A refusal; clients that repeat by themselves are told whether it is any use."""
    headers = {"x-should-retry": "true" if error.retry else "false"} if error.status >= 429 else {}
    if error.retry_s is not None:
        headers["retry-after"] = str(int(error.retry_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Json(body, status_code=error.status, headers=headers)


def _name(url: str) -> str:
    """The host name in a URL; empty where there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _is_own(name: str, more: tuple[str, ...]) -> bool:
    """Whether a host name is this machine's: an address, localhost, or one that was allowed."""
    if name == "localhost" or name.endswith(".localhost") or name in more or "*" in more:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _may_call(origin: str, allowed: tuple[str, ...]) -> bool:
    """Whether pages of an origin may call: pages of this machine, and those that were allowed."""
    if origin in allowed or "*" in allowed:
        return True
    name = _name(origin)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
