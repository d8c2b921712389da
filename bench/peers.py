"""Decode speed of this package beside mlx-lm and mlx-vlm: same machine, same pair, same token ids, taking turns.

    python bench/peers.py
    python bench/peers.py --pair DIR --rows 1 4 8 --tokens 128 --repeats 9 --widths auto 3 4 5 --json out.json

Everything runs greedily in float32 with end tokens off, in one process and on its main thread. Every runtime is
timed alike, from outside: from the moment the first token reaches the caller to the last. Within a repeat each
prompt goes through all runtimes before the next prompt does, in an order that turns by one and is reversed in
every other repeat; a ratio is taken within a repeat, and the median of the ratios is reported.

Tables go to stderr; the data goes to --json and --csv, or to stdout where that is not a terminal. On Linux the
script starts itself anew with OpenBLAS preloaded, for every runtime alike, if it finds one. mlx-vlm is left out,
with a note, where it is not installed.
"""

from __future__ import annotations

import argparse
import csv
import ctypes.util
import gc
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

Prompt = tuple[int, ...]
PRELOAD = "LD_PRELOAD"
LATENCY_WIDTH = 3  # the fixed width at which latency is measured, beside plain decoding and "auto"

# what runs ----------------------------------------------------------------------------------------------------


@dataclass
class Drafts:
    """What drafting brought in a run. rounds: target passes after the prompt.

    drafted_at[i], kept_at[i]: how often position i was drafted, and how often it was kept.
    """

    rounds: int = 0
    drafted_at: list[int] = field(default_factory=list)
    kept_at: list[int] = field(default_factory=list)

    def add(self, rounds: int, drafted_at: Sequence[int], kept_at: Sequence[int]) -> None:
        self.rounds += rounds
        for mine, other in ((self.drafted_at, drafted_at), (self.kept_at, kept_at)):
            mine += [0] * (len(other) - len(mine))
            for i, count in enumerate(other):
                mine[i] += count

    @property
    def acceptance_by_position(self) -> list[float]:
        return [round(k / d, 4) if d else 0.0 for k, d in zip(self.kept_at, self.drafted_at, strict=True)]


class Session(Protocol):
    """Requests that run side by side."""

    def submit(self, prompt: Prompt, tokens: int) -> int:
        """Queue a request of exactly so many new tokens; returns its id."""
        ...

    def step(self) -> list[tuple[int, list[int]]]:
        """Do a bit of work; (id, new tokens) of every request that got some."""
        ...

    def close(self) -> None:
        """Count what drafting brought, and let go of everything."""
        ...


class Runtime(Protocol):
    """One way of decoding. `solo` is the runtime's own loop for a single request, `open` the one for several.

    drafted: tokens it drafts a round; None where it chooses.
    """

    name: str
    drafted: int | None

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]: ...

    def open(self) -> Session: ...

    def drafts(self) -> Drafts:
        """Of what has run since this was last asked."""
        ...


class Ours:
    """This package at one width. What the width policy has learnt stays, as it does in a Pair."""

    def __init__(self, loaded: Any, width: int | str) -> None:
        from mlx_mtp.depth import depth_of

        self.name, self.drafted = f"mlx-mtp width {width}", width if isinstance(width, int) else None
        self._loaded, self._depth, self._drafts = loaded, depth_of(width), Drafts()

    def open(self) -> OurSession:
        return OurSession(self._loaded, self._depth, self._drafts)

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        session = self.open()
        session.submit(prompt, tokens)
        while not session.engine.idle:
            yield from (new for _, new in session.step())

    def drafts(self) -> Drafts:
        taken, self._drafts = self._drafts, Drafts()
        return taken


class OurSession:
    """An engine without end tokens."""

    def __init__(self, loaded: Any, depth: Any, drafts: Drafts) -> None:
        from mlx_mtp.cache import Cache
        from mlx_mtp.depth import MAX_WIDTH
        from mlx_mtp.drafters.mtp import MtpDrafter
        from mlx_mtp.engine import Engine
        from mlx_mtp.scheduler import Limits

        target = loaded.target
        cache = Cache(target.model.specs, MAX_WIDTH, target.dtype)
        drafter = MtpDrafter(target.model, loaded.drafter.model, cache)
        self.engine = Engine(target.model, cache, drafter, depth, Limits())
        self._drafts = drafts

    def submit(self, prompt: Prompt, tokens: int) -> int:
        from mlx_mtp.rows import GREEDY, Request

        return self.engine.submit(Request(prompt, tokens, GREEDY, frozenset()))

    def step(self) -> list[tuple[int, list[int]]]:
        out = []
        for event in self.engine.step():
            out.append((event.request, list(event.tokens)))
            if event.stats:
                self._drafts.add(event.stats.rounds, event.stats.drafted_at, event.stats.kept_at)
        return out

    def close(self) -> None:
        pass


class MlxLm:
    """mlx-lm without a drafter: `generate_step` for one request, `BatchGenerator` for several."""

    name, drafted = "mlx-lm plain", 0

    def __init__(self, target: Path) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self.model, _ = load_model(target)
        self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=tokens):
            yield [int(token)]

    def open(self) -> MlxLmSession:
        return MlxLmSession(self.model)

    def drafts(self) -> Drafts:
        return Drafts()


class MlxLmSession:
    """What `mlx_lm.batch_generate` and its server run."""

    def __init__(self, model: Any) -> None:
        from mlx_lm.generate import BatchGenerator

        self._generator = BatchGenerator(model)

    def submit(self, prompt: Prompt, tokens: int) -> int:
        return self._generator.insert([list(prompt)], [tokens])[0]

    def step(self) -> list[tuple[int, list[int]]]:
        return [(r.uid, [r.token]) for r in self._generator.next()[1]]

    def close(self) -> None:
        self._generator.close()


@dataclass(frozen=True)
class VlmPair:
    """mlx-vlm's target and drafter."""

    model: Any
    drafter: Any
    kind: str


class MlxVlm:
    """mlx-vlm: `generate_step` for one request, its server's `BatchGenerator` for several.

    block: its draft_block_size, one more than the tokens drafted; None decodes plainly.
    """

    def __init__(self, pair: VlmPair, block: int | None) -> None:
        self.name, self.drafted = f"mlx-vlm block {block}" if block else "mlx-vlm plain", (block or 1) - 1
        self._pair, self._block, self._drafts = pair, block, Drafts()

    def solo(self, prompt: Prompt, tokens: int) -> Iterator[list[int]]:
        import mlx.core as mx
        from mlx_vlm.generate.ar import generate_step

        pair, options = self._pair, {}
        if self._block:
            self._set_block()
            options = {
                "draft_model": pair.drafter,
                "draft_kind": pair.kind,
                "draft_block_size": self._block,
            }
        steps = generate_step(mx.array([prompt]), pair.model, None, None, max_tokens=tokens, temperature=0.0, **options)
        for token, _ in steps:
            yield [int(token)]
        self._count()

    def open(self) -> MlxVlmSession:
        if self._block:
            self._set_block()
        return MlxVlmSession(self._pair, self._block, self._count)

    def drafts(self) -> Drafts:
        taken, self._drafts = self._drafts, Drafts()
        return taken

    def _set_block(self) -> None:
        """Its loop goes back to the configured size, 4, where a larger one is only asked for."""
        self._pair.drafter.config.block_size = self._block

    def _count(self) -> None:
        """Add the rounds that it has just recorded; for a batch each is one round of all rows, which it keeps level."""
        if not self._block:
            return
        kept, drafted = self._pair.drafter.accept_lens, self._pair.drafter.draft_lens
        most = range(max(drafted, default=0))
        at = [sum(d > i for d in drafted) for i in most], [sum(k > i for k in kept) for i in most]
        self._drafts.add(len(kept), *at)


class MlxVlmSession:
    """What mlx-vlm's server runs on its GPU thread."""

    def __init__(self, pair: VlmPair, block: int | None, count: Callable[[], None]) -> None:
        from mlx_vlm.generate.ar import BatchGenerator

        options = {}
        if block:
            options = {"draft_model": pair.drafter, "draft_kind": pair.kind, "draft_block_size": block}
        self._model, self._count = pair.model, count
        self._generator = BatchGenerator(
            pair.model.language_model,
            _NoTokenizer(),
            compute_logprobs=False,
            greedy_sampling=True,
            **options,
        )

    def submit(self, prompt: Prompt, tokens: int) -> int:
        import mlx.core as mx

        embedded = self._model.get_input_embeddings(mx.array([prompt]), None, mask=None).to_dict()
        kwargs = {name: value for name, value in embedded.items() if value is not None}
        return self._generator.insert([list(prompt)], tokens, prompt_kwargs=[kwargs])[0]

    def step(self) -> list[tuple[int, list[int]]]:
        new: dict[int, list[int]] = {}
        for response in self._generator.next()[1]:
            if response.token is not None:
                new.setdefault(response.uid, []).append(int(response.token))
        return list(new.items())

    def close(self) -> None:
        self._count()
        self._generator.close()


class _NoTokenizer:
    """Stands where mlx-vlm asks its processor whether a token ends the text: none does."""

    @property
    def stopping_criteria(self) -> _NoTokenizer:
        return self

    def add_eos_token_ids(self, tokens: Any) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


def load_vlm(pair: Path) -> VlmPair:
    """mlx-vlm's pair. It drafts only for its multimodal class, so the text checkpoint gets an unused vision tower."""
    import mlx.core as mx
    from mlx_vlm.models.gemma4 import gemma4
    from mlx_vlm.models.gemma4.config import ModelConfig, TextConfig, VisionConfig
    from mlx_vlm.speculative.drafters import load_drafter

    text = TextConfig.from_dict(json.loads((pair / "target" / "config.json").read_text()))
    small = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 32)
    one = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    model = gemma4.Model(ModelConfig(text_config=text, vision_config=VisionConfig(**small, **one), audio_config=None))
    weights = {}
    for file in sorted((pair / "target").glob("*.safetensors")):
        for name, value in mx.load(str(file)).items():
            weights |= _vlm_names("language_model." + name, value)
    model.load_weights(list(weights.items()), strict=False)
    _require_all(model, weights)
    drafter, kind = load_drafter(str(pair / "drafter"))
    model.set_dtype(mx.float32)
    drafter.set_dtype(mx.float32)
    mx.eval(model.parameters(), drafter.parameters())
    return VlmPair(model, drafter, kind)


def _vlm_names(name: str, value: Any) -> dict[str, Any]:
    """A weight under mlx-vlm's name; fused expert matrices are split."""
    import mlx.core as mx

    if name.endswith("experts.gate_up_proj"):
        gate, up = (mx.contiguous(part) for part in mx.split(value, 2, axis=-2))
        stem = name.removesuffix("gate_up_proj") + "switch_glu."
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {name.replace("down_proj", "switch_glu.down_proj.weight"): value}
    return {name: value}


def _require_all(model: Any, weights: dict[str, Any]) -> None:
    from mlx.utils import tree_flatten

    wanted = {"language_model." + name for name, _ in tree_flatten(model.language_model.parameters())}
    missing = sorted(wanted - set(weights))
    if missing:
        raise SystemExit(f"mlx-vlm's model has weights that the checkpoint lacks: {', '.join(missing[:4])}")


# one run ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Tokens of a run as they reached the caller. arrivals: (seconds, row, tokens). start: when it was asked for.

    cpu: what the process had used, all threads together, at the first and the latest of them.
    """

    rows: int
    arrivals: list[tuple[float, int, list[int]]] = field(default_factory=list)
    cpu: tuple[float, float] | None = None
    start: float = 0.0

    def arrive(self, at: float, row: int, new: list[int]) -> None:
        used = time.process_time()
        self.cpu = (self.cpu[0] if self.cpu else used, used)
        self.arrivals.append((at, row, new))

    def tokens(self, row: int) -> list[int]:
        return [t for _, r, new in self.arrivals if r == row for t in new]

    def times(self, row: int) -> list[float]:
        return [at for at, r, _ in self.arrivals if r == row]

    @property
    def decoded(self) -> int:
        """Tokens of all rows that came after the first moment."""
        first = self.arrivals[0][0]
        return sum(len(new) for at, _, new in self.arrivals if at > first)

    @property
    def seconds(self) -> float:
        return self.arrivals[-1][0] - self.arrivals[0][0]

    @property
    def whole(self) -> tuple[int, float]:
        """All tokens, and the seconds from the request to the last of them."""
        return sum(len(new) for _, _, new in self.arrivals), self.arrivals[-1][0] - self.start


def run_case(runtime: Runtime, prompts: Sequence[Prompt], tokens: int) -> Run:
    """One prompt through the runtime's single loop, several through its batch."""
    gc.collect()  # also lets the pass finish that some runtimes leave behind
    run = Run(len(prompts))
    if len(prompts) > 1:
        return play(runtime, [Planned(prompt, tokens) for prompt in prompts])
    count, run.start = 0, time.perf_counter()
    for new in runtime.solo(prompts[0], tokens):
        new = new[: tokens - count]
        if new:
            run.arrive(time.perf_counter(), 0, new)
        count += len(new)
    return run


@dataclass(frozen=True)
class Planned:
    """A request that arrives `at` seconds after the start."""

    prompt: Prompt
    tokens: int
    at: float = 0.0


def play(runtime: Runtime, plan: Sequence[Planned]) -> Run:
    """Run requests through a batch; like a server's loop it takes up what has arrived between two steps.

    Times are seconds since the start; row i is plan[i].
    """
    session, run = runtime.open(), Run(len(plan))
    left, row_of, waiting = [p.tokens for p in plan], {}, list(range(len(plan)))
    start = time.perf_counter()
    while any(left):
        now = time.perf_counter() - start
        for i in [i for i in waiting if plan[i].at <= now]:
            row_of[session.submit(plan[i].prompt, plan[i].tokens)] = i
            waiting.remove(i)
        got = session.step()
        now = time.perf_counter() - start
        for request, new in got:
            row = row_of[request]
            new = new[: left[row]]
            if new:
                run.arrive(now, row, new)
                left[row] -= len(new)
    session.close()
    return run


# speed --------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A runtime's figures for one setting. runs: those of the warm-up, per case.

    All lists but that have one number per repeat. whole_tok_s counts from the request, prompt included. cpu_ms is
    processor time for a token, which other programs disturb less.
    """

    tok_s: list[float] = field(default_factory=list)
    whole_tok_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    drafts: Drafts = field(default_factory=Drafts)
    stable: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.tok_s)


def turns(count: int, repeat: int, case: int) -> list[int]:
    """The order of `count` runtimes: turned by one with every repeat and case, reversed in every other repeat."""
    shift = (repeat + case) % count
    order = [(i + shift) % count for i in range(count)]
    return order[::-1] if repeat % 2 else order


def compare(runtimes: Sequence[Runtime], cases: Sequence[Sequence[Prompt]], args: Any) -> dict[str, Measured]:
    """Every runtime over every case, `args.repeats` times, taking turns."""
    out = {runtime.name: Measured() for runtime in runtimes}
    for runtime in runtimes:
        runtime.drafts()
        out[runtime.name].runs = [run_case(runtime, case, args.tokens) for case in cases]
        out[runtime.name].drafts = runtime.drafts()
    for repeat in range(args.repeats):
        spent = {name: [0.0] * 5 for name in out}
        for number, case in enumerate(cases):
            for i in turns(len(runtimes), repeat, number):
                measured, run = out[runtimes[i].name], run_case(runtimes[i], case, args.tokens)
                measured.stable &= all(run.tokens(r) == measured.runs[number].tokens(r) for r in range(run.rows))
                used = run.decoded, run.seconds, run.cpu[1] - run.cpu[0], *run.whole
                spent[runtimes[i].name] = [a + b for a, b in zip(spent[runtimes[i].name], used, strict=True)]
        for name, (count, seconds, cpu, all_count, all_seconds) in spent.items():
            out[name].tok_s.append(count / seconds)
            out[name].cpu_ms.append(1000 * cpu / count)
            out[name].whole_tok_s.append(all_count / all_seconds)
    return out


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    found = {"median": statistics.median(values), "min": min(values), "max": max(values), "q1": low, "q3": high}
    return {name: round(value, 4) for name, value in found.items()}


def ratios(measured: dict[str, Measured]) -> list[dict]:
    """Each of ours over each peer, as the spread of the ratios within a repeat."""
    mine = [name for name in measured if name.startswith("mlx-mtp")]
    peers = [name for name in measured if name not in mine]
    blocks = [name for name in peers if "block" in name]
    best = max(blocks, key=lambda name: measured[name].median, default=None)
    out = []
    for ours in mine:
        for peer in peers:
            a, b = measured[ours], measured[peer]
            found = spread([x / y for x, y in zip(a.tok_s, b.tok_s, strict=True)])
            whole = spread([x / y for x, y in zip(a.whole_tok_s, b.whole_tok_s, strict=True)])
            out.append({"ours": ours, "peer": peer, "best_block": peer == best, **found, "whole": whole})
    return out


class Reference:
    """What the target alone writes: this package at width 0, a row at a time; and by how much it was sure."""

    def __init__(self, loaded: Any, text: Any) -> None:
        from mlx_mtp.pair import Pair

        self._plain, self._pair = Ours(loaded, 0), Pair(loaded, text)
        self._known: dict[tuple[Prompt, int], list[int]] = {}

    def tokens(self, prompt: Prompt, count: int) -> list[int]:
        if (prompt, count) not in self._known:
            self._known[prompt, count] = run_case(self._plain, [prompt], count).tokens(0)
        return self._known[prompt, count]

    def divergence(self, prompt: Prompt, got: list[int]) -> dict | None:
        """Where a text first differs, and the gap between the two best logits there; None if it never does."""
        import mlx.core as mx

        wanted = self.tokens(prompt, len(got))
        at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), None)
        if at is None:
            return None
        logits = self._pair.logits([*prompt, *wanted[:at]])[0, -1]
        second, first = mx.sort(logits)[-2:].tolist()
        return {"at": at, "expected": wanted[at], "got": got[at], "margin": first - second}


def divergences(reference: Reference, cases: Sequence[Sequence[Prompt]], runs: Sequence[Run]) -> list[dict]:
    found = []
    for number, (case, run) in enumerate(zip(cases, runs, strict=True)):
        for row, prompt in enumerate(case):
            where = reference.divergence(prompt, run.tokens(row))
            if where:
                found.append({"case": number, "row": row, **where})
    return found


def tokens_per_round(runtime: Runtime, cases: Sequence[Sequence[Prompt]], measured: Measured) -> list[float]:
    """Of every row of every case: a row's rounds are the steps that brought it tokens, after the first."""
    if len(cases[0]) == 1:
        rounds = measured.drafts.rounds or sum(len(run.arrivals) - 1 for run in measured.runs)
        return [sum(len(run.tokens(0)) - 1 for run in measured.runs) / rounds]
    return [(len(run.tokens(row)) - 1) / (len(run.times(row)) - 1) for run in measured.runs for row in range(run.rows)]


def versus_solo(
    runtime: Runtime, cases: Sequence[Sequence[Prompt]], in_batch: Sequence[float], tokens: int
) -> dict[str, Any]:
    """Tokens per round of the rows alone, and what of it remains in the batch."""
    alone = []
    for prompt in (prompt for case in cases for prompt in case):
        runtime.drafts()
        run = run_case(runtime, [prompt], tokens)
        alone.append((len(run.tokens(0)) - 1) / (runtime.drafts().rounds or len(run.arrivals) - 1))
    shares = [a / b for a, b in zip(in_batch, alone, strict=True)]
    figures = {"solo": alone, "in_batch": list(in_batch), "share": shares}
    return {name: [round(x, 4) for x in values] for name, values in figures.items()} | {
        "mean_share": round(statistics.mean(shares), 4),
        "least_share": round(min(shares), 4),
    }


def decode_table(
    runtimes: Sequence[Runtime], lengths: str, cases: Sequence[Sequence[Prompt]], reference: Reference, args: Any
) -> dict:
    """Speed, tokens per round, acceptance and identity of every runtime, for one number of rows."""
    measured = compare(runtimes, cases, args)
    out: dict[str, Any] = {"rows": len(cases[0]), "lengths": lengths, "tokens": args.tokens}
    out |= {"prompt_tokens": [[len(p) for p in case] for case in cases], "runtimes": {}}
    for runtime in runtimes:
        m = measured[runtime.name]
        per_round = tokens_per_round(runtime, cases, m)
        found = divergences(reference, cases, m.runs)
        entry = {"tok_s": [round(x, 2) for x in m.tok_s], "tok_s_spread": spread(m.tok_s)}
        entry |= {"whole_tok_s": [round(x, 2) for x in m.whole_tok_s]}
        entry |= {"cpu_ms_per_token": round(statistics.median(m.cpu_ms), 4)}
        entry |= {"tokens_per_round": round(statistics.mean(per_round), 4), "rounds": m.drafts.rounds}
        entry |= {"acceptance_by_position": m.drafts.acceptance_by_position}
        entry |= {"identical": not found, "divergences": found, "same_in_every_repeat": m.stable}
        if len(cases[0]) > 1 and runtime.drafted:
            entry["versus_solo"] = versus_solo(runtime, cases, per_round, args.tokens)
        out["runtimes"][runtime.name] = entry
    return out | {"ratios": ratios(measured)}


# host reads ---------------------------------------------------------------------------------------------------

READERS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__array__")


@contextmanager
def counted_reads() -> Iterator[Counter]:
    """Counts what lets the host wait for the device: readers of mx.array, numpy's conversions, and mx.eval."""
    import mlx.core as mx
    import numpy as np

    seen: Counter = Counter()

    def counting(name: str, original: Callable, only_arrays: bool = False) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += not only_arrays or (bool(args) and isinstance(args[0], mx.array))
            return original(*args, **kwargs)

        return call

    saved = [(mx.array, name, vars(mx.array)[name]) for name in READERS]
    saved += [(mx, "eval", mx.eval), (np, "array", np.array), (np, "asarray", np.asarray)]
    try:
        for owner, name, original in saved:
            setattr(owner, name, counting(name, original, owner is np))
        yield seen
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def read_counts(runtime: Runtime, prompts: Sequence[Prompt], tokens: int) -> dict[str, Any]:
    """Reads per round of decoding, without the prompt: a longer run less a shorter one."""
    counts, rounds = [], []
    for length in (tokens // 2, tokens):
        runtime.drafts()
        with counted_reads() as seen:
            run = run_case(runtime, prompts, length)
        steps = len({at for at, _, _ in run.arrivals}) - 1
        rounds.append(runtime.drafts().rounds if len(prompts) == 1 else steps)
        rounds[-1] = rounds[-1] or steps
        counts.append(Counter(seen))
    more = max(1, rounds[1] - rounds[0])
    per_round = {name: (counts[1][name] - counts[0][name]) / more for name in counts[1]}
    evals = per_round.pop("eval", 0.0)
    kinds = {name: round(value, 3) for name, value in per_round.items() if value}
    return {"reads_per_round": round(sum(per_round.values()), 3), "evals_per_round": round(evals, 3), **kinds}


# latency ------------------------------------------------------------------------------------------------------


def latency(runtime: Runtime, short: Prompt, long: Prompt, running: Planned) -> dict[str, float]:
    """Milliseconds to the first token of a short request, and between the tokens of a running one.

    idle: the machine has nothing else to do. behind: it arrives 1 ms after a long prompt. beside: it arrives
    while another request decodes. entering: a long prompt arrives while another request decodes; gap is that
    request's longest wait between two tokens then, usual_gap its longest without.
    """
    gc.collect()
    idle = play(runtime, [Planned(short, 8)]).times(0)[0]
    behind = play(runtime, [Planned(long, 8), Planned(short, 8, 0.001)]).times(1)[0] - 0.001
    alone = play(runtime, [running]).times(0)
    at = alone[0] + (alone[-1] - alone[0]) / 4
    beside = play(runtime, [running, Planned(short, 8, at)]).times(1)[0] - at
    entering = play(runtime, [running, Planned(long, 8, at)])
    found = {"idle": idle, "behind": behind, "beside": beside, "entering": entering.times(1)[0] - at}
    found |= {"usual_gap": _longest_gap(alone), "gap": _longest_gap(entering.times(0))}
    return {name: 1000 * seconds for name, seconds in found.items()}


def _longest_gap(times: Sequence[float]) -> float:
    return max(b - a for a, b in zip(times, times[1:], strict=False))


def latency_table(runtimes: Sequence[Runtime], prompts: Sequence[Prompt], args: Any) -> dict:
    """Medians over the repeats, the runtimes taking turns."""
    stream = [token for prompt in prompts for token in prompt[1:]]
    long = (prompts[0][0], *(stream * (args.long // len(stream) + 1)))[: args.long]
    running = Planned(prompts[1], 2 * args.tokens)
    found: dict[str, list[dict]] = {runtime.name: [] for runtime in runtimes}
    for repeat in range(args.repeats):
        for i in turns(len(runtimes), repeat, 0):
            found[runtimes[i].name].append(latency(runtimes[i], prompts[0], long, running))
    out: dict[str, Any] = {"short_tokens": len(prompts[0]), "long_tokens": len(long), "running": running.tokens}
    out["runtimes"] = {}
    for name, repeats in found.items():
        medians = {key: statistics.median([r[key] for r in repeats]) for key in repeats[0]}
        medians |= {f"{key}_factor": medians[key] / medians["idle"] for key in ("behind", "beside")}
        out["runtimes"][name] = {key: round(value, 3) for key, value in medians.items()}
    return out


# prompts ------------------------------------------------------------------------------------------------------


def read_prompts(pair: Path, text: Any, kind: str) -> list[Prompt]:
    """Held-out prompts beside the pair as token ids; chat prompts go through the template."""
    file = pair / "prompts.json"
    if file.is_file():
        texts = json.loads(file.read_text())[kind]
    else:
        note(f"{file} is missing; this script's own functions serve as prompts")
        texts = ["def " + part[:160] for part in Path(__file__).read_text().split("\ndef ")[1:]]
    if kind == "chat":
        return [tuple(text.chat([{"role": "user", "content": message}])) for message in texts]
    return [tuple(text.encode(t)) for t in texts]


def groups(prompts: Sequence[Prompt], rows: int, lengths: str, most: int) -> list[list[Prompt]]:
    """At most `most` groups of so many prompts. "same": cut at the front to one length. "mixed": 1 to 4 joined."""
    if rows == 1:
        return [[prompt] for prompt in prompts[:most]]
    if len(prompts) < rows:
        raise SystemExit(f"{rows} rows need as many prompts; there are {len(prompts)}")
    taken = [list(prompts[i : i + rows]) for i in range(0, len(prompts) - rows + 1, rows)]
    out = []
    for number, group in enumerate(taken[: max(1, most // rows)]):
        if lengths == "same":
            length = min(map(len, group))
            out.append([(p[0], *p[len(p) - length + 1 :]) for p in group])
            continue
        mixed = []
        for row, prompt in enumerate(group):
            before = [prompts[(number * rows + row + k) % len(prompts)] for k in range(row % 4, 0, -1)]
            mixed.append((prompt[0], *(t for p in before for t in p[1:]), *prompt[1:]))
        out.append(mixed)
    return out


# set-up -------------------------------------------------------------------------------------------------------


def preload_openblas(refused: bool) -> None:
    """Start anew with OpenBLAS in front: MLX's Linux wheel brings the reference BLAS, which no one would serve with."""
    if refused or sys.platform != "linux" or "openblas" in os.environ.get(PRELOAD, ""):
        return
    library = _find_openblas()
    if library is None:
        note("no OpenBLAS found; the reference BLAS makes wide passes several times slower than they need be")
        return
    already = os.environ.get(PRELOAD)
    new = {PRELOAD: f"{library}:{already}" if already else library, "OPENBLAS_NUM_THREADS": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **new})


def _find_openblas() -> str | None:
    found = ctypes.util.find_library("openblas")
    if found:
        return found
    places = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/OpenBLAS/lib")
    hits = (hit for place in places for hit in sorted(Path("/").glob(f"{place[1:]}/libopenblas*.so.0")))
    return next((str(hit) for hit in hits), None)


def environment(pair: Path) -> dict[str, Any]:
    """What the figures depend on."""
    import mlx.core as mx

    from mlx_mtp.doctor import facts

    blas = next((f"{fact.state} ({fact.reason})" for fact in facts() if fact.item == "BLAS"), "the platform's")
    versions = {}
    for name in ("mlx", "mlx-lm", "mlx-vlm", "mlx-mtp", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    weights = {str(f.relative_to(pair)): _sha256(f) for f in sorted(pair.glob("*/*.safetensors"))}
    return {
        "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "machine": f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} processors",
        "device": str(mx.default_device()),
        "blas": blas,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "not set"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
        "weights_sha256": weights,
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _width(text: str) -> int | str:
    return text if text in ("auto", "heuristic") else int(text)


def parse_args() -> argparse.Namespace:
    first, *rest = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, help="folder with target/ and drafter/ (default: the embedded pair)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="requests at once")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of every request")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--widths", type=_width, nargs="+", default=["auto", 3, 4, 5], help="ours; 0 is added")
    parser.add_argument("--blocks", type=int, nargs="*", default=[3, 4, 5, 6], help="mlx-vlm's, drafts + 1")
    parser.add_argument("--cases", type=int, default=6, help="prompts, or groups of prompts times rows")
    parser.add_argument("--kind", choices=("code", "chat"), default="code", help="which held-out prompts")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--skip", choices=("decode", "reads", "latency"), nargs="*", default=[])
    parser.add_argument("--no-preload", action="store_true", help="take the BLAS that MLX brings")
    parser.add_argument("--json", type=Path, help="write all figures to a file")
    parser.add_argument("--csv", type=Path, help="write tok/s of every repeat to a file")
    return parser.parse_args()


def runtimes_of(loaded: Any, pair: Path, args: argparse.Namespace) -> list[Runtime]:
    """Ours at every width, then the peers."""
    widths = list(dict.fromkeys([*args.widths, 0]))
    out: list[Runtime] = [Ours(loaded, width) for width in widths]
    out.append(MlxLm(pair / "target"))
    if find_spec("mlx_vlm") is None:
        note("mlx-vlm is not installed and is left out (pip install mlx-vlm)")
        return out
    vlm = load_vlm(pair)
    return [*out, MlxVlm(vlm, None), *(MlxVlm(vlm, block) for block in args.blocks)]


# showing ------------------------------------------------------------------------------------------------------


class Report:
    """Tables on stderr."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table

        table = Table(title=title, title_justify="left", header_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def environment(self, found: dict[str, Any]) -> None:
        for name, value in found.items():
            self._console.print(f"{name}: {value}", highlight=False)

    def decode(self, found: dict) -> None:
        title = f"{found['rows']} row(s), {found['lengths']} lengths, {found['tokens']} tokens each"
        rows = [_decode_row(name, entry) for name, entry in found["runtimes"].items()]
        columns = ("runtime", "tok/s", "min..max", "cpu ms/tok", "tok/round", "kept by position", "of solo", "text")
        self._table(title, columns, rows)
        rows = [
            (
                f"{r['ours']} / {r['peer']}" + (" (its best)" if r["best_block"] else ""),
                f"{r['median']:.2f}",
                f"{r['min']:.2f}..{r['max']:.2f}",
                f"{r['q1']:.2f}..{r['q3']:.2f}",
                f"{r['whole']['median']:.2f}",
            )
            for r in found["ratios"]
            if r["best_block"] or "block" not in r["peer"]
        ]
        columns = ("", "median", "min..max", "quartiles", "with the prompt")
        self._table("ratio of tok/s within a repeat", columns, rows)

    def reads(self, rows: int, found: dict[str, dict]) -> None:
        lines = []
        for name, entry in found.items():
            kinds = [f"{k} {v:g}" for k, v in entry.items() if not k.endswith("per_round")]
            lines.append((name, f"{entry['reads_per_round']:g}", f"{entry['evals_per_round']:g}", ", ".join(kinds)))
        title = f"what lets the host wait for the device, per round, {rows} row(s)"
        self._table(title, ("runtime", "reads", "mx.eval", "of which"), lines)

    def latency(self, found: dict) -> None:
        title = (
            f"milliseconds to the first token of a short request ({found['short_tokens']} tokens), "
            f"long prompt {found['long_tokens']} tokens"
        )
        columns = ("runtime", "idle", "behind long prompt", "beside a running row")
        columns += ("long prompt beside it", "its longest gap then", "without")
        rows = [
            (
                name,
                f"{r['idle']:.1f}",
                f"{r['behind']:.1f} ({r['behind_factor']:.1f}x)",
                f"{r['beside']:.1f} ({r['beside_factor']:.1f}x)",
                *(f"{r[key]:.1f}" for key in ("entering", "gap", "usual_gap")),
            )
            for name, r in found["runtimes"].items()
        ]
        self._table(title, columns, rows)


def _decode_row(name: str, entry: dict) -> tuple[str, ...]:
    speed = entry["tok_s_spread"]
    where = entry["divergences"]
    text = "identical" if entry["identical"] else f"differs in {len(where)}, margin {where[0]['margin']:.1e}"
    if not entry["same_in_every_repeat"]:
        text += ", not the same every time"
    share = f"{entry['versus_solo']['mean_share']:.3f}" if "versus_solo" in entry else ""
    kept = " ".join(f"{x:.2f}" for x in entry["acceptance_by_position"])
    speeds = f"{speed['median']:.1f}", f"{speed['min']:.1f}..{speed['max']:.1f}"
    costs = f"{entry['cpu_ms_per_token']:.2f}", f"{entry['tokens_per_round']:.2f}"
    return name, *speeds, *costs, kept, share, text


def write_csv(file: Path, found: dict) -> None:
    """A line for every repeat of every runtime and setting."""
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("rows", "lengths", "runtime", "repeat", "tok_s"))
        for table in found["decode"]:
            for name, entry in table["runtimes"].items():
                for repeat, tok_s in enumerate(entry["tok_s"]):
                    writer.writerow((table["rows"], table["lengths"], name, repeat, tok_s))


def save(found: dict, args: argparse.Namespace) -> None:
    """Write the files that were asked for; called after every table, so that a run cut short leaves something."""
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.csv:
        write_csv(args.csv, found)


def measure(runtimes: Sequence[Runtime], prompts: list[Prompt], reference: Reference, found: dict, args: Any) -> None:
    """Add everything that was asked for to `found`; each table is shown and saved as soon as it is known."""
    report = Report()
    for rows in args.rows:
        for lengths in ("natural",) if rows == 1 else ("same", "mixed"):
            cases = groups(prompts, rows, lengths, args.cases)
            if "decode" not in args.skip:
                found["decode"].append(decode_table(runtimes, lengths, cases, reference, args))
                report.decode(found["decode"][-1])
                save(found, args)
        if "reads" not in args.skip:
            counts = {r.name: read_counts(r, cases[0], min(args.tokens, 64)) for r in runtimes}
            found["reads"][str(rows)] = counts
            report.reads(rows, counts)
    if "latency" not in args.skip:
        few = [r for r in runtimes if r.drafted in (None, 0, LATENCY_WIDTH)]
        found["latency"] = latency_table(few, prompts, args)
        report.latency(found["latency"])
    save(found, args)


def main() -> None:
    args = parse_args()
    preload_openblas(args.no_preload)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import mlx.core as mx

    import mlx_mtp
    from mlx_mtp.load import load_pair
    from mlx_mtp.text import Text

    pair = args.pair or Path(mlx_mtp.__file__).parent / "data" / "tiny"
    loaded = load_pair(str(pair / "target"), str(pair / "drafter"), dtype=mx.float32)
    text = Text.from_dir(pair / "target")
    prompts = read_prompts(pair, text, args.kind)
    runtimes = runtimes_of(loaded, pair, args)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    found = {"environment": environment(pair), "settings": settings, "decode": [], "reads": {}, "latency": {}}
    Report().environment(found["environment"])
    measure(runtimes, prompts, Reference(loaded, text), found, args)
    if not args.json and not sys.stdout.isatty():
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
