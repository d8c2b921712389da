"""The check in front of every route: hosts, origins, keys, and one log line a request. Plain ASGI; knows no dialect.

A web page must not use this server without its user's knowledge. A page's requests carry an Origin, which must be
allowed. A page whose name an attacker points at this machine (DNS rebinding) carries that name as Host. So only this
machine's names and bare addresses are answered.
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
QUIET_PATHS = ("/health", "/health/live", "/metrics")  # polled every few seconds; only failures are logged
RenderError = Callable[[str, ServerError], Any]


class AccessMiddleware:
    """Refuses requests or passes them on, and logs each."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, render: RenderError) -> None:
        """render: makes the JSON body of an error; its first argument is the request's path."""
        self._app, self._settings, self._metrics, self._render = app, settings, metrics, render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
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
            entry["error"] = error.message
            await error_response(self._render(scope["path"], error), error)(scope, receive, answer)
        else:
            await self._app(scope, receive, answer)
        finally:
            self._log(scope, entry, 499 if entry.pop("gone", False) else status, time.perf_counter() - start)

    def _log(self, scope: Scope, entry: dict[str, Any], status: int, seconds: float) -> None:
        route = scope.get("route")
        self._metrics.request(route.path if route is not None else "other", status)
        head = {"time": round(time.time(), 3), "id": entry.pop("id"), "method": scope["method"], "path": scope["path"]}
        if scope["path"] not in QUIET_PATHS or status >= 500:
            log({**head, "status": status, "seconds": round(seconds, 4), **entry})

    def _check(self, scope: Scope) -> None:
        """Raises ServerError: 403 for a foreign host or origin, 401 without the key."""
        headers, settings = Headers(scope=scope), self._settings
        host = headers.get("host", "")
        if host and not _is_own(_hostname(f"//{host}"), settings.hosts):
            raise ServerError(403, "host_not_allowed", f"host {host[:200]!r} is not allowed; see --allow-host")
        origin = headers.get("origin")
        if origin is not None and not _may_call(origin, settings.origins):
            raise ServerError(403, "origin_not_allowed", f"origin {origin[:200]!r} is not allowed; see --cors-origin")
        preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if settings.api_key is not None and scope["path"] not in OPEN_PATHS and not preflight:
            self._check_key(headers, settings.api_key)

    def _check_key(self, headers: Headers, key: str) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Every wrong key takes the same time. Headers are bytes, which starlette reads as Latin-1.
        if not hmac.compare_digest(given.encode("latin-1"), key.encode("utf-8", "replace")):
            message = "the API key is missing or wrong; send it as Authorization: Bearer or x-api-key"
            raise ServerError(401, "invalid_api_key", message)


def error_response(body: Any, error: ServerError) -> Json:
    """A refusal. Its headers say whether an automatic retry can succeed."""
    retry = "false" if error.retry_s is None else "true"
    headers = {"x-should-retry": retry} if error.status >= 429 else {}
    if error.retry_s is not None:
        headers["retry-after"] = str(int(error.retry_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Json(body, status_code=error.status, headers=headers)


def _hostname(url: str) -> str:
    """The host name in a URL, empty if there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _is_localhost(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _is_own(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether a host name is this machine's: an address, localhost, or an allowed name."""
    if _is_localhost(name) or name in allowed or "*" in allowed:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _may_call(origin: str, allowed: tuple[str, ...]) -> bool:
    """Whether pages of an origin may call: pages of this machine, and of allowed origins."""
    if origin in allowed or "*" in allowed:
        return True
    name = _hostname(origin)
    try:
        return _is_localhost(name) or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
