"""The verdict of a round: the target's choice in every column, and how much of the draft that keeps.

Not run on Metal: tested in a CPU emulator.
For B rows of L columns over V tokens: the choice (choice.py) among logits at or above a threshold, comparison with the
draft, number of columns kept, next bonus token, and the hidden state that produced it. Two dispatches: V is cut into
chunks, so that a single row still fills the device; then one threadgroup a row does the rest. Nothing reaches the host.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.kernels import choice
from mlx_mtp.kernels.backend import SMALL, Definition, Launch, not_small, run, why_not_here
from mlx_mtp.kernels.matrix import FLOATS

TAKES = "1 to 64 columns"

CHUNK = 8192  # logits of a threadgroup in the first dispatch
MAX_COLUMNS = 64  # of a row: their winners are held in threadgroup memory


# Grid: chunks, columns of all rows.
SCAN = Definition(
    "verdict_scan",
    ("logits", "threshold", *choice.DRAW_INPUTS),
    ("best_value", "best_token"),
    f"""
    const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const uint index = thread_index_in_threadgroup;
    const uint chunk = threadgroup_position_in_grid.x, chunks = threadgroups_per_grid.x;
    const uint L = logits_shape[1], V = logits_shape[2];
    const uint column = threadgroup_position_in_grid.y, row = column / L;
    threadgroup Best part[8];
    {choice.draw_text("row", "column % L")}
    const float least = float(threshold[column]);
    const uint end = min(V, (chunk + 1) * CHUNK);
    Best best = nobody();
    for (uint token = chunk * CHUNK + index; token < end; token += 256) {{
      const float logit = float(logits[size_t(column) * V + token]);
      if (logit >= least) {{
        Best next;
        next.token = token;
        next.value = choice_value(logit, inverse, key, token);
        best = better(best, next);
      }}
    }}
    best = group_best(best, part, lane, simdgroup, 8);
    if (index == 0) {{
      best_value[column * chunks + chunk] = best.value;
      best_token[column * chunks + chunk] = best.token;
    }}
""",
    choice.METAL,
)

# One threadgroup a row.
JUDGE = Definition(
    "verdict_judge",
    ("best_value", "best_token", "draft", "hidden"),
    ("token", "kept", "bonus", "picked"),
    """
    const uint lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const uint index = thread_index_in_threadgroup, row = threadgroup_position_in_grid.x;
    const uint chunks = best_value_shape[1], L = hidden_shape[1], E = hidden_shape[2];
    threadgroup int chosen[64];
    for (uint l = simdgroup; l < L; l += 8) {
      Best best = nobody();
      for (uint c = lane; c < chunks; c += 32) {
        Best next;
        next.value = best_value[(row * L + l) * chunks + c];
        next.token = best_token[(row * L + l) * chunks + c];
        best = better(best, next);
      }
      best = simd_best(best);
      if (lane == 0) chosen[l] = winner(best);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint matches = 0;
    while (matches + 1 < L && int(draft[row * (L - 1) + matches]) == chosen[matches]) matches++;
    if (index < L) token[row * L + index] = chosen[index];
    if (index == 0) {
      kept[row] = int(matches) + 1;
      bonus[row] = chosen[matches];
    }
    const size_t from = (size_t(row) * L + matches) * E;
    for (uint e = index; e < E; e += 256) picked[size_t(row) * E + e] = hidden[from + e];
""",
    choice.METAL,
)


@dataclass(frozen=True)
class Verdict:
    """tokens [B, L], kept [B] (1 to L), bonus [B], all int32; hidden [B, E]: the state that chose the bonus."""

    tokens: mx.array
    kept: mx.array
    bonus: mx.array
    hidden: mx.array


@dataclass(frozen=True)
class Round:
    """What is judged: logits [B, L, V] float, draft [B, L - 1] integer, hidden [B, L, E] float.

    threshold [B, L] float32: only logits at or above it compete; draw: position is that of column 0.
    """

    logits: mx.array
    draft: mx.array
    hidden: mx.array
    threshold: mx.array | None = None
    draw: choice.Draw | None = None


def why_not(judged: Round) -> str | None:
    """Why the kernels do not take this round, or None if they do."""
    rows, columns, vocabulary = judged.logits.shape
    if judged.logits.dtype not in FLOATS:
        return f"logits are {judged.logits.dtype}, not a float type"
    if not (rows and vocabulary and judged.hidden.shape[-1]):
        return f"nothing to judge in logits {judged.logits.shape}"
    if not 1 <= columns <= MAX_COLUMNS:
        return f"{columns} columns; the kernel takes 1 to {MAX_COLUMNS}"
    if judged.draft.shape != (rows, columns - 1) or judged.hidden.shape[:2] != (rows, columns):
        return f"draft {judged.draft.shape} and hidden {judged.hidden.shape} beside logits {judged.logits.shape}"
    return why_not_here()


def verdict(judged: Round) -> Verdict:
    """Judges a round."""
    if why_not(judged):
        return reference(judged)
    value, token = _scan(judged)
    rows, columns, width = judged.hidden.shape
    launch = Launch(
        grid=(256 * rows, 1, 1),
        threadgroup=(256, 1, 1),
        shapes=[(rows, columns), (rows,), (rows,), (rows, width)],
        dtypes=[mx.int32, mx.int32, mx.int32, judged.hidden.dtype],
        template=[],
    )
    draft = not_small(judged.draft) if columns > 1 else mx.array([0] * SMALL, mx.int32)  # a stand-in: never read
    return Verdict(*run(JUDGE, [value, token, draft, judged.hidden], launch))


def _scan(judged: Round) -> tuple[mx.array, mx.array]:
    """The best value [B * L, chunks] float32 and token [B * L, chunks] uint32 of each chunk of the vocabulary."""
    rows, columns, vocabulary = judged.logits.shape
    chunks = -(-vocabulary // CHUNK)
    launch = Launch(
        grid=(256 * chunks, rows * columns, 1),
        threadgroup=(256, 1, 1),
        shapes=[(rows * columns, chunks)] * 2,
        dtypes=[mx.float32, mx.uint32],
        template=[("CHUNK", CHUNK)],
    )
    count = rows * columns
    every = mx.array([-mx.inf] * max(count, SMALL)) if judged.threshold is None else not_small(judged.threshold)
    value, token = run(SCAN, [judged.logits, every, *choice.draw_inputs(judged.draw, rows)], launch)
    return value, token


def reference(judged: Round) -> Verdict:
    """The same in plain mlx."""
    _, columns, vocabulary = judged.logits.shape
    logits = competing = judged.logits.astype(mx.float32)
    if judged.draw is not None:
        position = judged.draw.position.astype(mx.uint32)[:, None] + mx.arange(columns).astype(mx.uint32)
        competing = choice.values(logits, judged.draw, position, mx.arange(vocabulary))
    if judged.threshold is not None:
        competing = mx.where(logits >= judged.threshold.astype(mx.float32)[..., None], competing, -mx.inf)
    chosen = mx.argmax(competing, axis=-1).astype(mx.int32)  # the first of the largest
    matches = (judged.draft.astype(mx.int32) == chosen[:, :-1]).astype(mx.int32)
    kept = 1 + mx.cumprod(matches, axis=1).sum(axis=1).astype(mx.int32)
    last = (kept - 1)[:, None]
    hidden = mx.take_along_axis(judged.hidden, last[..., None], axis=1)[:, 0]
    return Verdict(chosen, kept, mx.take_along_axis(chosen, last, axis=1)[:, 0], hidden)
