"""The process: the listening socket, signals, loading while /health already answers, and the exit. Knows no dialect."""

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
from mlx_mtp.server.nouns import Settings, shutting_down
from mlx_mtp.server.service import Admission
from mlx_mtp.server.worker import EngineThread, Progress

JOIN_S = 3.0  # time for the engine thread to end
LINGER_S = 2.0  # time after the grace for the last error to reach its client


class EngineFailed(Exception):
    """The engine has failed and will not recover; the process should exit with an error code."""


def listen(host: str, port: int) -> socket.socket:
    """A socket for `serve`. Raises RequestError before anything is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn with a graceful shutdown.

    After SIGTERM or SIGINT no request is accepted. Those that run or wait have `grace_s` to finish, then they get an
    error. A second SIGINT ends everything at once.
    """

    def __init__(self, admission: Admission) -> None:
        grace_s = admission.settings.grace_s
        config = uvicorn.Config(
            make_app(admission),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace_s + LINGER_S) + 1,
        )
        super().__init__(config)
        self._admission = admission

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # uvicorn's kills the process with the signal
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
        self._admission.draining = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._admission.draining = True
        late = asyncio.create_task(self._end_late())
        await super().shutdown(sockets)
        late.cancel()

    async def _end_late(self) -> None:
        await asyncio.sleep(self._admission.settings.grace_s)
        self._admission.engine_thread.abort(shutting_down())


def serve(settings: Settings, load: Callable[[], Pair], listener: socket.socket, progress: Progress) -> None:
    """Serve until a signal. load: makes the pair; called on the engine thread.

    Raises what `load` raised, and EngineFailed if the engine fails later and does not recover.
    """

    def failed(error: Exception) -> None:
        server.should_exit = True

    engine_thread = EngineThread(load, settings, progress, failed)
    server = Server(Admission(settings, engine_thread, Metrics()))
    server.run(sockets=[listener])
    engine_thread.abort(shutting_down(), stop=True)
    ended, error = engine_thread.join(JOIN_S), engine_thread.error
    if engine_thread.state == "failed" and error is not None:
        if not engine_thread.faults:
            raise error
        raise EngineFailed(f"the engine has failed: {type(error).__name__}: {error}") from None
    if not ended:  # still loading, or in a long pass; MLX would abort if the interpreter exited now
        os._exit(0)
