"""The application: every dialect's routes, health, metrics, errors in the form of whoever asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mlx_mtp.server import anthropic, infill, ollama, openai, responses
from mlx_mtp.server.gate import Gate, error_response
from mlx_mtp.server.nouns import ServerError
from mlx_mtp.server.openai_form import error_body
from mlx_mtp.server.respond import Json
from mlx_mtp.server.service import Service

DIALECTS = (openai.router, responses.router, anthropic.router, ollama.router, infill.router)


def make_app(service: Service) -> ASGIApp:
    """The ASGI application; its lifespan starts the worker and ends it."""
    app = FastAPI(title="mlx-mtp", lifespan=_lifespan(service), docs_url=None, redoc_url=None)
    for router in DIALECTS:
        app.include_router(router(service))
    _add_operation(app, service)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServerError)
        request.state.log["error"] = error.message
        return error_response(render_error(request.url.path, error), error)

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = request.method, request.url.path[:200]
        message = f"{method} is not allowed for {path}" if error.status_code == 405 else f"there is no {path} here"
        shown = ServerError(error.status_code, None, message)
        response = error_response(render_error(path, shown), shown)
        response.headers.update(error.headers or {})
        return response

    async def fault(request: Request, error: Exception) -> Response:
        request.state.log["error"] = f"{type(error).__name__}: {error}"[:300]
        shown = ServerError(500, "internal_error", "a fault of the server; its log has more")
        return error_response(render_error(request.url.path, shown), shown)

    app.add_exception_handler(Exception, fault)
    app.add_exception_handler(ServerError, refused)
    app.add_exception_handler(HTTPException, not_found)
    inner: ASGIApp = app
    if service.settings.origins:
        inner = CORSMiddleware(app, service.settings.origins, allow_methods=("*",), allow_headers=("*",))
    return Gate(inner, service.settings, service.metrics, render_error)


def render_error(path: str, error: ServerError) -> dict[str, Any]:
    """An error's body in the dialect that a path belongs to."""
    if path.startswith("/v1/messages"):
        return anthropic.error_body(error)
    if path.startswith("/api/"):
        return {"error": error.message}
    return error_body(error)


def _lifespan(service: Service) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.abort(ServerError(503, "shutting_down", "the server is shutting down"), stop=True)

    return lifespan


def _add_operation(app: FastAPI, service: Service) -> None:
    worker = service.worker

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are taken: 200, or 503 with the reason."""
        ready = worker.state == "ready" and not service.draining
        body = {
            "status": "ok" if ready else "draining" if service.draining else worker.state,
            "model": service.settings.name,
            "running": worker.running,
            "open": worker.open,
            "faults": worker.faults,
            "last_fault": None if worker.error is None else f"{type(worker.error).__name__}: {worker.error}"[:300],
        }
        return Json(body, status_code=200 if ready else 503)

    @app.get("/health/live")
    async def live() -> Response:
        """Whether the process is of any use: 503 only when the engine has failed for good."""
        failed = worker.state == "failed"
        return Json({"status": "failed" if failed else "alive"}, status_code=503 if failed else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(worker), media_type="text/plain; version=0.0.4; charset=utf-8")
