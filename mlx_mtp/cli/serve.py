"""`serve`: the OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_mtp.cli.app import command
from mlx_mtp.cli.choice import Choice, load_pair, parse_width, sampling_changes
from mlx_mtp.cli.output import say
from mlx_mtp.rows import RequestError

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

LISTEN, LIMIT, ACCESS = "Where and as whom", "Limits", "Access"


@dataclass(frozen=True)
class Serve(Choice):
    """The options of `serve`."""

    host: Annotated[
        str, typer.Option(rich_help_panel=LISTEN, help="Address to listen on; 0.0.0.0 is every network (set a key).")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(rich_help_panel=LISTEN, min=0, max=65535, help="0 takes a free one.")] = 8080
    name: Annotated[
        str | None,
        typer.Option(rich_help_panel=LISTEN, help="The model id clients see; unset = the folder's or hub id."),
    ] = None
    alias: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=LISTEN, help="Another id that requests may name, '*' for any; may be repeated."),
    ] = None
    rows: Annotated[int, typer.Option(rich_help_panel=LIMIT, min=1, max=64, help="Sequences at once, or fewer.")] = 8
    queue: Annotated[
        int, typer.Option(rich_help_panel=LIMIT, min=0, help="Texts that may wait; beyond them 429 with Retry-After.")
    ] = 64
    kv_gb: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=LIMIT,
            min=0.01,
            help="KV cache in GB, drafter included; unset = what weights and passes leave of the GPU's memory.",
        ),
    ] = None
    prefix_gb: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=LIMIT, min=0, help="Of it, for prefixes of earlier prompts and texts; unset = half, 0 none."
        ),
    ] = None
    max_body_mb: Annotated[
        int, typer.Option(rich_help_panel=LIMIT, min=1, max=1024, help="Longest request body; beyond it 413.")
    ] = 32
    loop_guard: Annotated[
        bool, typer.Option(rich_help_panel=LIMIT, help="End a chat's text that repeats itself without end.")
    ] = True
    keepalive_s: Annotated[
        float, typer.Option(rich_help_panel=LIMIT, min=0.1, help="A silent stream sends a comment this often.")
    ] = 5.0
    grace_s: Annotated[
        float, typer.Option(rich_help_panel=LIMIT, min=0, help="Time that open requests have after SIGTERM.")
    ] = 30.0
    api_key: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=ACCESS,
            envvar="MLX_MTP_API_KEY",
            help="Ask for this key (Authorization: Bearer, or x-api-key). In the environment nobody sees it.",
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=ACCESS, help="A web origin whose pages may call, '*' for any; may be repeated."),
    ] = None
    allow_host: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=ACCESS, help="A host name to answer to beside addresses and localhost."),
    ] = None


@command
def serve(options: Serve) -> None:
    """Serve editors and agents over HTTP in OpenAI's, Anthropic's and Ollama's dialects.

    Several requests run at once, drafting is on for all of them, and each has
    its own sampling; a request's text is the same alone and beside others.

    POST /v1/chat/completions, /v1/completions, /v1/responses: OpenAI's, whole or streamed.
    POST /v1/messages, /v1/messages/count_tokens: Anthropic's.
    POST /api/chat, /api/generate, /api/show, GET /api/tags, /api/version: Ollama's.
    POST /infill: llama.cpp's, for completion in the middle of a text.
    GET /v1/models, /v1/models/ID: the one model served.
    GET /health: 200 when requests are taken, 503 with the reason when not.
    GET /health/live: 503 only when the engine has failed for good.
    GET /metrics: for Prometheus.

    Requests: --max-tokens and the sampling options are defaults for those that
    name none. A field that cannot be honoured is a 400 that names it. Another
    model's name is a 404 (see --alias); nothing is ever loaded for a request.
    A request without max_tokens may fill its fair share of the KV cache, and
    write at least 4,096 tokens after a long prompt if the cache holds them.

    Clients: one that goes away frees its place before the next round. stderr
    has one line of JSON a request, and the progress of loading.

    Faults: if the engine fails, every open request gets an error, and a new
    engine is built over the same weights, since a desk has no supervisor to
    start a process again. The third fault in five minutes ends the process.

    Signals: after SIGTERM or Ctrl-C open requests may finish within --grace-s;
    a second Ctrl-C ends at once. Exit codes: 0 after a signal, 1 after faults,
    2 for a mistake in options or checkpoint.
    """
    sampling, width = sampling_changes(options), parse_width(options.width)
    from mlx_mtp.loops import LoopLimits
    from mlx_mtp.server.nouns import Settings
    from mlx_mtp.server.run import EngineFailed, listen
    from mlx_mtp.server.run import serve as run

    settings = Settings(
        name=options.name or (Path(options.model).name if Path(options.model).is_dir() else options.model),
        aliases=tuple(options.alias or ()),
        max_num_seqs=options.rows,
        max_queued=options.queue,
        num_draft_tokens=width,
        sampling=sampling,
        max_tokens=options.max_tokens,
        api_key=options.api_key,
        origins=tuple(options.cors_origin or ()),
        hosts=(*(options.allow_host or ()), options.host),
        body_bytes=options.max_body_mb * 2**20,
        loop_guard=LoopLimits() if options.loop_guard else None,
        keepalive_s=options.keepalive_s,
        grace_s=options.grace_s,
    )
    if options.api_key == "":
        raise RequestError("the API key is empty; give one, or leave the option out")
    bound = listen(options.host, options.port)
    host, port = bound.getsockname()[:2]
    if not host.startswith("127.") and host != "::1" and options.api_key is None:
        say(f"warning: {host} is open to the network and there is no --api-key")
    try:
        run(settings, lambda: _load(options), bound, _progress(f"http://{host}:{port}/v1"))
    except EngineFailed as error:
        say(str(error))
        raise typer.Exit(1) from None


def _load(options: Serve) -> Pair:
    from mlx_mtp.scheduler import Limits

    kv_bytes = None if options.kv_gb is None else int(options.kv_gb * 1e9)
    prefix_bytes = None if options.prefix_gb is None else int(options.prefix_gb * 1e9)
    return load_pair(options, Limits(max_rows=options.rows, kv_bytes=kv_bytes), prefix_bytes)


def _progress(url: str) -> Callable[[str, int, int], None]:
    def report(stage: str, done: int, total: int) -> None:
        say(f"{stage} {done}/{total}" if done < total else f"ready: {url}")

    return report
