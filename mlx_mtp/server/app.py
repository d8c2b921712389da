"""The application: every dialect's routes, health, metrics, and errors in the form of the dialect that was called."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mlx_mtp.server import anthropic, infill, ollama, openai, responses
from mlx_mtp.server.gate import AccessMiddleware, error_response
from mlx_mtp.server.nouns import ServerError, shutting_down
from mlx_mtp.server.openai_form import error_body
from mlx_mtp.server.respond import Json
from mlx_mtp.server.service import Admission

DIALECTS = (openai.router, responses.router, anthropic.router, ollama.router, infill.router)


def make_app(admission: Admission) -> ASGIApp:
    """The ASGI application. Its lifespan starts and stops the engine thread."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        admission.engine_thread.start()
        yield
        admission.engine_thread.abort(shutting_down(), stop=True)

    app = FastAPI(title="mlx-mtp", lifespan=lifespan, docs_url=None, redoc_url=None)
    for router in DIALECTS:
        app.include_router(router(admission))
    _add_operations(app, admission)
    _add_error_handlers(app)
    inner: ASGIApp = app
    if admission.settings.origins:
        inner = CORSMiddleware(app, admission.settings.origins, allow_methods=("*",), allow_headers=("*",))
    return AccessMiddleware(inner, admission.settings, admission.metrics, render_error)


def render_error(path: str, error: ServerError) -> dict[str, Any]:
    """An error's body in the dialect that a path belongs to."""
    if path.startswith("/v1/messages"):
        return anthropic.error_body(error)
    if path.startswith("/api/"):
        return {"error": error.message}
    return error_body(error)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ServerError)
    async def refused(request: Request, error: ServerError) -> Response:
        request.state.log["error"] = error.message
        return error_response(render_error(request.url.path, error), error)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path[:200]
        message = f"{method} is not allowed for {path}" if error.status_code == 405 else f"{path} does not exist"
        shown = ServerError(error.status_code, None, message)
        response = error_response(render_error(path, shown), shown)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        request.state.log["error"] = f"{type(error).__name__}: {error}"[:300]
        shown = ServerError(500, "internal_error", "internal error; see the server's log")
        return error_response(render_error(request.url.path, shown), shown)


def _add_operations(app: FastAPI, admission: Admission) -> None:
    engine_thread = admission.engine_thread

    @app.get("/health")
    async def health() -> Response:
        """200 if requests are accepted, otherwise 503 with the reason."""
        error, ready = engine_thread.error, engine_thread.state == "ready" and not admission.draining
        body = {
            "status": "ok" if ready else "draining" if admission.draining else engine_thread.state,
            "model": admission.settings.name,
            "running": engine_thread.running,
            "open": engine_thread.open,
            "faults": engine_thread.faults,
            "last_fault": None if error is None else f"{type(error).__name__}: {error}"[:300],
        }
        return Json(body, status_code=200 if ready else 503)

    @app.get("/health/live")
    async def live() -> Response:
        """503 only if the engine has failed and will not recover."""
        failed = engine_thread.state == "failed"
        return Json({"status": "failed" if failed else "alive"}, status_code=503 if failed else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        page = admission.metrics.page(engine_thread)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")
