"""Does the memory budget hold? Peak memory of a real width cut to a few layers, against what the budget counts.

    python bench/memory.py E2B --bits 16                       # one line of JSON; one layer of each kind
    python bench/memory.py --table > docs/memory.md            # what every Mac holds, computed

Weights are random. Prompts and replies have the given length; several sequences run at once and draft.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from made_up import MadeUp, Size, make
from mlx.utils import tree_flatten

from mlx_mtp.cache import Cache
from mlx_mtp.chips import CHIPS
from mlx_mtp.doctor import on_gpu
from mlx_mtp.draft_length import MAX_WIDTH, make_policy
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.engine import Engine
from mlx_mtp.memory_budget import CPU, GPU, PairSize, size_of
from mlx_mtp.pairs import KNOWN
from mlx_mtp.plan import Machine, Wish, memory_of
from mlx_mtp.rows import Request, Sampling
from mlx_mtp.scheduler import Limits
from mlx_mtp.shapes import Shape, shape

MACS_GB = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192)


@dataclass(frozen=True)
class Load:
    """What runs: sequences at once, tokens of each one's prompt and output, prompt chunk, tokens drafted."""

    batch: int
    prompt_tok: int
    new_tok: int
    chunk: int
    width: int


@dataclass(frozen=True)
class Peak:
    """Bytes, counted by the budget and measured. error: of the total, counted over measured, less 1."""

    weights: int
    counted: int
    measured: int
    counted_working: int
    measured_working: int

    @property
    def error(self) -> float:
        return self.counted / self.measured - 1


def pair_size(made: MadeUp) -> PairSize:
    """What the budget has to know of a pair in memory."""
    target, drafter = (sum(x.nbytes for _, x in tree_flatten(m.parameters())) for m in (made.target, made.drafter))
    cache = Cache(made.target.specs, MAX_WIDTH, made.dtype)
    own = MtpDrafter(made.target, made.drafter, cache)
    size = size_of(made.target.config, target, drafter, lambda n: cache.row_bytes(n) + own.row_bytes(n))
    return replace(size, device=replace(GPU if on_gpu() else CPU, number_bytes=made.dtype.size))


def cut(found: Shape) -> Shape:
    """One sliding and one full layer of a published size, as wide as they are."""
    kinds = {layer.window is None: layer for layer in reversed(found.target.layers)}
    layers = tuple(replace(kinds[full], owner=i) for i, full in enumerate((False, True)))
    return replace(found, target=replace(found.target, layers=layers))


def measure(made: MadeUp, load: Load) -> Peak:
    """Run a pair from empty caches to the end of all outputs."""
    size = pair_size(made)
    cache = Cache(made.target.specs, MAX_WIDTH, made.dtype)
    limits = Limits(load.batch, alone_tok=load.chunk, chunk_tok=load.chunk, first_chunk_tok=load.chunk, stall_s=0.01)
    drafter = MtpDrafter(made.target, made.drafter, cache)
    engine = Engine(made.target, cache, drafter, make_policy(load.width), limits)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    rng = np.random.default_rng(0)
    sampling = Sampling(1.0, top_k=64, top_p=0.95)
    for _ in range(load.batch):
        prompt = tuple(map(int, rng.integers(0, made.target.config.vocab_size, load.prompt_tok)))
        engine.submit(Request(prompt, load.new_tok, sampling, frozenset()))
    while not engine.idle:
        engine.step()
    peak = mx.get_peak_memory()
    caches = load.batch * size.seq_bytes(load.prompt_tok + load.new_tok)
    working = size.working_bytes(load.chunk, load.batch, load.prompt_tok + load.new_tok)
    weights = size.target_bytes + size.drafter_bytes
    return Peak(weights, weights + caches + working, peak, working, peak - before - caches)


PAGE = """# Memory

This page is written by `python bench/memory.py --table > docs/memory.md`. It computes; nothing here was run on a
Mac.

One function (`mlx_mtp/memory_budget.py`) shares out the memory for `plan`, `pairs`, `load`, `serve` and `doctor`:

- **Usable** is what macOS lets the GPU hold (`doctor` shows it): by default two thirds of up to 36 GB, three
  quarters of more. `sudo sysctl iogpu.wired_limit_mb=<MB>` raises it.
- **Weights** of target and drafter come from the headers of their files.
- **Passes** take what the widest layer holds during a prompt chunk, attention scores, or the logits of the widest
  round, and 256 MiB for MLX's own buffers on a GPU. Chunks are 2,048 tokens and are halved, down to 512, while
  their pass would take more than a fifth of what the weights leave.
- The rest is for **keys and values**: every sequence has its windows, whatever its length, and grows with its
  tokens. Prefixes of earlier prompts may take half of it while no sequence needs it.

Up to 8 sequences run at once (`serve --rows`), fewer where each would not hold 8,192 tokens of prompt and output. A
pair that cannot hold one such sequence is refused before its weights are read. `--kv-gb` overrides that.

Memory is reserved for the most a request may write, so no running request ever runs out of it. A request that names
no `max_tokens` may fill its fair share, the cache divided by the sequences that run at once, and write at least
4,096 tokens after a long prompt. So as many default requests run at once as the table says. A request that names
more takes more, and others wait until it fits. `generate` and `chat` run one sequence, which may take everything.

## Measured

Peaks on a CPU in float32 at published widths, with one sliding and one full layer and the whole vocabulary. Total:
what `plan` counts over what MLX's peak was.

| widths | weights | prompt chunk | sequences | drafts | counted / measured |
|---|---|---|---|---|---|
| E2B, bf16 file | 2.78 GB | 512 | 2 | 15 | 2.928 / 2.896 GB, +1.1 % |
| E2B, bf16 file | 2.78 GB | 2,048 | 1 | 15 | 3.449 / 3.339 GB, +3.3 % |
| 26B-A4B, 4 bits | 1.75 GB | 128 | 1 | 7 | 1.861 / 1.813 GB, +2.6 % |

By `python bench/memory.py E2B --bits 16 --batch 2 --prompt-tok 520 --new-tok 17` and the like, 2026-12-01.

## What every Mac holds

Sequences at once x thousands of tokens of each / thousands of tokens of one that runs alone. Drafters are bf16;
"4+4" has the drafter in 4 bits too (`--quantize-drafter 4`). Contexts end at 131 (E2B, E4B) and 262 thousand
tokens. Other programs need memory as well.

"""


def page() -> str:
    """docs/memory.md."""
    kinds = ((4, 16, "4"), (4, 4, "4+4"), (8, 16, "8"), (16, 16, "16"))
    head = ["pair", "bits", *(f"{gb} GB" for gb in MACS_GB)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for pair in KNOWN:
        for bits, drafter_bits, name in kinds:
            cells = (_cell(gb, Wish(pair.size, bits, drafter_bits, 1, 1)) for gb in MACS_GB)
            lines.append(f"| {pair.size} | {name} | {' | '.join(cells)} |")
    return PAGE + "\n".join(lines) + "\n"


def _cell(memory_gb: int, wish: Wish) -> str:
    b = memory_of(Machine(CHIPS[-1], memory_gb), wish, shape(wish.size)).default
    return f"{b.num_seqs} x {b.fair_share_len // 1000} / {b.max_seq_len // 1000}" if b.fits else "no"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="E2B")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8, 16))
    parser.add_argument("--layers", type=int, default=None)
    for name, default in (("batch", 4), ("prompt-tok", 1024), ("new-tok", 48), ("chunk", 512), ("width", MAX_WIDTH)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    if options.table:
        print(page(), end="")
        return 0
    found = shape(options.size)
    made = make(cut(found) if options.layers is None else found, Size(options.size, options.bits, options.layers))
    load = Load(options.batch, options.prompt_tok, options.new_tok, options.chunk, options.width)
    peak = measure(made, load)
    print(json.dumps({"size": options.size, "layers": made.layers, **vars(load), **vars(peak), "error": peak.error}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
