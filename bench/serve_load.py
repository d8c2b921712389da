"""One load for several servers, taking turns: this package's, mlx_lm.server, and mlx-vlm's with its drafter.

    python bench/serve_load.py                                        # the embedded pair
    python bench/serve_load.py --target DIR --drafter DIR --vlm-python PATH --repeats 5 --json out.json
    python bench/serve_load.py --quick                                # a minute: does it run at all
    python bench/serve_load.py --only behind                          # short behind long alone

Every server gets the same float32 checkpoint, runs as a process of its own with the same BLAS, and idles while
another is measured. A measurement is so many clients that stream chats one after another; every client has its own
prompts, and all servers see the same ones. Servers take turns within a repeat, in an order that turns by one and is
reversed in every other repeat. Figures are of the client's side:

- tok/s: all completion tokens (as each server's usage has them) over the time from the first request to the last end.
- first token: from sending a request to the first chunk with text, median over requests.
- short behind long: the first token of a short request sent 50 to 130 ms after one with a long prompt, over that of
  one as long on the idle server, in pairs of which every prompt is new to the server; median of `--pairs` a repeat. Of
  this package's servers also what their log counts: passes from the engine's taking a request up to its first token,
  and positions in them. The pass that runs when the request comes is one more at most.
- greedy beside hot: how often a greedy text stays what it is alone while a request at temperature 1.5 runs.

mlx-vlm drafts only for its multimodal class, so the text checkpoint is written once more with an unused vision tower.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_S, REQUEST_S = 300.0, 600.0
TINY = Path(__file__).resolve().parent.parent / "mlx_mtp" / "data" / "tiny"
SHORT_TOK = 100  # a prompt of 16 words has fewer
COUNTS = ("idle_passes", "idle_positions", "behind_passes", "behind_positions")
WORDS = "def class return import for if while with try self value name path file read write list dict open key".split()

# servers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server to measure. model: what requests call it, since mlx_lm.server loads whatever it is asked for."""

    name: str
    command: list[str]
    port: int
    model: str
    log: Path
    health: str = "/health"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def servers(args: argparse.Namespace, folder: Path) -> list[Server]:
    """The servers that were asked for and are installed; says which are not."""
    target, drafter = str(folder / "target"), str(args.drafter)
    out = []
    for width in args.widths if "ours" in args.servers else ():
        port = free_port()
        command = [sys.executable, "-m", "mlx_mtp", "serve", "-m", target, "--drafter", drafter, "--width", width]
        command += ["--dtype", "float32", "--port", str(port), "--name", "served", "--queue", "1000"]
        out.append(Server(f"mlx-mtp width {width}", command, port, "served", folder / f"{port}.log"))
    if "mlx-lm" in args.servers:
        port = free_port()
        command = [args.lm_python, "-m", "mlx_lm", "server", "--model", target, "--port", str(port)]
        out.append(Server("mlx-lm", command, port, "default_model", folder / f"{port}.log"))
    if "mlx-vlm" in args.servers and args.vlm_python:
        port, vlm = free_port(), write_multimodal(Path(target), folder / "vlm")
        command = [args.vlm_python, "-m", "mlx_vlm.server", "--model", str(vlm), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--draft-model", drafter, "--draft-kind", "mtp"]
        command += ["--draft-block-size", str(args.block)]
        out.append(Server("mlx-vlm", command, port, str(vlm), folder / f"{port}.log"))
    elif "mlx-vlm" in args.servers:
        note("mlx-vlm is left out; name a Python that has it with --vlm-python")
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(server: Server) -> Iterator[None]:
    """A server as a process, from its first healthy answer to its end."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OPENBLAS_NUM_THREADS="1")
    blas = ctypes.util.find_library("openblas")
    if sys.platform == "linux" and blas:
        environment["LD_PRELOAD"] = blas
    with server.log.open("w") as out:
        process = subprocess.Popen(server.command, stdout=out, stderr=out, env=environment)
        try:
            end = time.monotonic() + START_S
            while not healthy(server):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{server.name} did not start: {server.log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def healthy(server: Server) -> bool:
    try:
        return httpx.get(server.url + server.health, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


# checkpoints --------------------------------------------------------------------------------------------------


def write_float32(source: Path, out: Path) -> Path:
    """A copy of a checkpoint folder with its weights in float32, which a CPU computes in anyway."""
    import mlx.core as mx

    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            weights = mx.load(str(file))
            assert isinstance(weights, dict)
            mx.save_safetensors(str(out / file.name), {k: v.astype(mx.float32) for k, v in weights.items()})
        elif file.name == "config.json":
            config = json.loads(file.read_text())
            (out / file.name).write_text(json.dumps({**config, "dtype": "float32", "torch_dtype": "float32"}))
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def write_multimodal(source: Path, out: Path) -> Path:
    """A text checkpoint as a multimodal one with the smallest vision tower, whose weights are zeros and never used."""
    import mlx.core as mx

    out.mkdir(parents=True)
    text = json.loads((source / "config.json").read_text())
    small = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 32)
    one = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config = {
        "model_type": "gemma4",
        "text_config": text,
        "vision_config": {"model_type": "gemma4_vision", **small, **one},
        "audio_config": None,
        "eos_token_id": text["eos_token_id"],
    }
    (out / "config.json").write_text(json.dumps(config))
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            weights = mx.load(str(file))
            assert isinstance(weights, dict)
            named = {"language_model." + k: v for k, v in weights.items()}
            mx.save_safetensors(str(out / file.name), named, metadata={"format": "mlx"})
        elif file.name != "config.json":
            (out / file.name).write_bytes(file.read_bytes())
    return out


# load ---------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What one measurement saw. first_s: of every request. tokens: of all. seconds: of the whole."""

    first_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def ask(client: httpx.Client, server: Server, prompt: str, tokens: int, load: Load) -> None:
    """Stream one chat to its end."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, usage, chunks = time.perf_counter(), None, None, 0
    with client.stream("POST", server.url + "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            load.failures.append(f"{answer.status_code} {answer.read()[:200]!r}")
            return
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if any(has_text(choice.get("delta") or {}) for choice in chunk.get("choices") or []):
                first, chunks = first or time.perf_counter(), chunks + 1
            usage = chunk.get("usage") or usage
    if first is None or not chunks:
        load.failures.append("a stream without text")
        return
    load.first_s.append(first - begun)
    load.tokens += used(usage) if usage else chunks


def has_text(delta: dict[str, Any]) -> bool:
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning"))


def used(usage: dict[str, Any]) -> int:
    return usage.get("completion_tokens") or usage.get("output_tokens") or 0


def measure(server: Server, clients: int, args: argparse.Namespace, seed: int) -> Load:
    """`clients` threads, each with requests of its own one after another."""
    load, begun = Load(), time.perf_counter()

    def run(number: int) -> None:
        with httpx.Client(timeout=REQUEST_S) as client:
            for i in range(args.requests):
                ask(client, server, text(seed + 1000 * number + i, args.prompt), args.tokens, load)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - begun
    return load


def short_behind_long(server: Server, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Medians over some pairs: seconds to a short request's first token, idle and behind a long prompt."""
    alone, behind, long = Load(), Load(), Load()
    with httpx.Client(timeout=REQUEST_S) as client, httpx.Client(timeout=REQUEST_S) as other:
        ask(other, server, text(seed, 16), 4, Load())  # opens its connection
        for i in range(args.pairs):
            first = seed + 1 + 3 * i
            ask(client, server, text(first, 16), 4, alone)
            thread = threading.Thread(target=ask, args=(other, server, text(first + 1, args.long), 4, long))
            thread.start()
            time.sleep(0.05 + 0.08 * i / args.pairs)  # at another place in a pass every time
            ask(client, server, text(first + 2, 16), 4, behind)
            thread.join()
    if alone.failures + behind.failures + long.failures:
        raise SystemExit(f"{server.name}: {(alone.failures + behind.failures + long.failures)[0]}")
    ratios = [b / a for a, b in zip(alone.first_s, behind.first_s, strict=True)]
    counted = {f"{name}_{key}": count for name, key, count in counts(server.log, args.pairs)}
    seconds = {"idle_s": statistics.median(alone.first_s), "behind_s": statistics.median(behind.first_s)}
    return {**seconds, "long_s": statistics.median(long.first_s), "times_idle": statistics.median(ratios), **counted}


def counts(log: Path, pairs: int) -> Iterator[tuple[str, str, float]]:
    """(idle or behind, passes or positions, median) of the last pairs of requests; none where the log has no counts."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"ttft_positions": ' in line]
    short = [line for line in lines if line["prompt_tok"] < SHORT_TOK][-2 * pairs :]  # in turn
    for name, some in (("idle", short[::2]), ("behind", short[1::2])):
        for key in ("passes", "positions"):
            if some:
                yield name, key, statistics.median(line[f"ttft_{key}"] for line in some)


def kept_beside_a_hot_request(server: Server, tries: int = 4) -> float:
    """Share of tries in which a greedy text was the same beside a request at temperature 1.5 as alone."""

    def answer(prompt: str, temperature: float) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": server.model, "messages": messages, "max_tokens": 40, "temperature": temperature}
        reply = httpx.post(server.url + "/v1/chat/completions", json={**body, "top_p": 1.0}, timeout=REQUEST_S)
        reply.raise_for_status()
        return reply.json()["choices"][0]["message"]["content"]

    alone, same = answer("def read(path):", 0), 0
    for _ in range(tries):
        hot = threading.Thread(target=answer, args=("import os", 1.5))
        hot.start()
        same += answer("def read(path):", 0) == alone
        hot.join()
    return same / tries


def text(seed: int, words: int) -> str:
    """Words that differ from prompt to prompt from the first one on, so that no server has them cached."""
    state, out = (seed * 2654435761 + 12345) % 2**32, []
    for _ in range(words):
        state = (state * 1664525 + 1013904223) % 2**32
        out.append(WORDS[(state >> 16) % len(WORDS)])
    return " ".join(out)


# reports ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as plain values."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-load-")))
        write_float32(args.target, folder / "target")
        chosen = servers(args, folder)
        for server in chosen:
            stack.enter_context(started(server))
            measure(server, max(args.concurrent), args, seed=99)  # kernels, graphs, and what the width policy learns
        for repeat in range(args.repeats):
            turn = chosen[repeat % len(chosen) :] + chosen[: repeat % len(chosen)]
            for clients in args.concurrent if args.only != "behind" else ():
                for server in reversed(turn) if repeat % 2 else turn:
                    load = measure(server, clients, args, seed=10_000 * (repeat + 1) + 100 * clients)
                    rows.append(row(server, repeat, clients, load))
            for server in turn:
                told = short_behind_long(server, args, seed=777 + 1000 * repeat)
                rows.append({"server": server.name, "repeat": repeat, **told})
        for server in chosen if args.only != "behind" else ():
            rows.append({"server": server.name, "kept_text": kept_beside_a_hot_request(server)})
    return {"rows": rows, "load_average": os.getloadavg(), "arguments": {k: str(v) for k, v in vars(args).items()}}


def row(server: Server, repeat: int, clients: int, load: Load) -> dict[str, Any]:
    if load.failures:
        note(f"{server.name} with {clients}: {len(load.failures)} failed, the first with {load.failures[0]}")
    return {
        "server": server.name,
        "repeat": repeat,
        "clients": clients,
        "tok_s": load.tok_s,
        "tokens": load.tokens,
        "first_s": statistics.median(load.first_s) if load.first_s else None,
        "failures": len(load.failures),
    }


def report(data: dict[str, Any]) -> None:
    """A table on stderr: medians over the repeats, lowest and highest behind them."""
    rows = data["rows"]
    note(f"load average {data['load_average'][0]:.1f}")
    for name in dict.fromkeys(r["server"] for r in rows):
        mine = [r for r in rows if r["server"] == name]
        for clients in dict.fromkeys(r["clients"] for r in mine if "clients" in r):
            some = [r for r in mine if r.get("clients") == clients]
            firsts = [r["first_s"] for r in some if r["first_s"] is not None]
            note(f"{name:20} {clients} clients  tok/s {spread([r['tok_s'] for r in some])}  first s {spread(firsts)}")
        pairs = [r for r in mine if "behind_s" in r]
        note(f"{name:20} short behind long, times idle: {spread([r['times_idle'] for r in pairs])}")
        for key in [key for key in ("idle_s", "behind_s", "long_s", *COUNTS) if key in pairs[0]]:
            note(f"{name:20}   {key.replace('_', ' '):20} {spread([r[key] for r in pairs])}")
        for kept in [r["kept_text"] for r in mine if "kept_text" in r]:
            note(f"{name:20} greedy text the same beside a hot request: {kept:.0%}")


def spread(values: list[float]) -> str:
    if not values:
        return "none"
    return f"{statistics.median(values):8.3f} ({min(values):.3f}..{max(values):.3f})"


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=TINY / "target", help="a bf16 or float32 checkpoint folder")
    parser.add_argument("--drafter", type=Path, default=TINY / "drafter")
    parser.add_argument("--servers", nargs="+", default=["ours", "mlx-lm", "mlx-vlm"])
    parser.add_argument("--widths", nargs="+", default=["auto"], help="ours, each as a server of its own")
    parser.add_argument("--block", type=int, default=4, help="mlx-vlm's draft block size, drafts + 1")
    parser.add_argument("--lm-python", default=sys.executable, help="a Python that has mlx-lm")
    parser.add_argument("--vlm-python", help="a Python that has mlx-vlm")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=4, help="of each client, one after another")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=64, help="words of a prompt")
    parser.add_argument("--long", type=int, default=1500, help="words of the long prompt")
    parser.add_argument(
        "--pairs", type=int, default=6, help="of an idle and a short request behind a long one, a repeat"
    )
    parser.add_argument("--only", choices=["all", "behind"], default="all", help="measure only short behind long")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat of one short request each")
    parser.add_argument("--json", type=Path, help="write the data there")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.tokens, args.repeats, args.concurrent, args.long = 1, 12, 1, [1, 2], 200
        args.pairs = 2
    return args


def main() -> None:
    args = arguments()
    data = run(args)
    report(data)
    if args.json:
        args.json.write_text(json.dumps(data, indent=1))
    elif not sys.stdout.isatty():
        print(json.dumps(data))


if __name__ == "__main__":
    main()
