"""The process: the listening socket, signals, loading beside serving, and how it ends. Knows no dialect."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from mlx_mtp.pair import Pair
from mlx_mtp.rows import RequestError
from mlx_mtp.server.app import make_app
from mlx_mtp.server.metrics import Metrics
from mlx_mtp.server.nouns import ServerError, Settings
from mlx_mtp.server.service import Service
from mlx_mtp.server.worker import Progress, Reports, Worker

END_S = 3.0  # for the engine thread to see that it should end
LINGER_S = 2.0  # after the grace, for the last error to reach its client


class EngineFailed(Exception):
    """The engine has failed for good; the process should end with a code that says so."""


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises RequestError where that cannot be, before anything is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from None
    return bound


class Server(uvicorn.Server):
    """uvicorn, with the end of this program's own making: what runs may finish, up to a grace.

    SIGTERM or SIGINT: no new requests; those that run or wait have `grace_s`, then an error. A second SIGINT ends
    everything at once.
    """

    def __init__(self, service: Service) -> None:
        grace_s = service.settings.grace_s
        config = uvicorn.Config(
            make_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace_s + LINGER_S) + 1,
        )
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # uvicorn's would kill the process with the signal afterwards
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self._service.draining = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        late = asyncio.create_task(self._end_late())
        await super().shutdown(sockets)
        late.cancel()

    async def _end_late(self) -> None:
        await asyncio.sleep(self._service.settings.grace_s)
        self._service.worker.abort(ServerError(503, "shutting_down", "the server is shutting down"))


def serve(settings: Settings, load: Callable[[], Pair], bound: socket.socket, progress: Progress) -> None:
    """Serve until a signal. load: makes the pair; called on the engine thread, while /health already answers.

    Raises what `load` raised, and EngineFailed if the engine fails for good later.
    """

    def failed(error: Exception) -> None:
        server.should_exit = True

    worker = Worker(load, settings, Reports(progress, failed))
    server = Server(Service(settings, worker, Metrics()))
    server.run(sockets=[bound])
    worker.abort(ServerError(503, "shutting_down", "the server is shutting down"), stop=True)
    ended = worker.join(END_S)
    if worker.state == "failed" and worker.error is not None:
        if worker.model is None:
            raise worker.error
        raise EngineFailed(f"the engine has failed: {type(worker.error).__name__}: {worker.error}") from None
    if not ended:  # it loads, or is in a long pass; MLX would abort if the interpreter ended around it
        os._exit(0)
