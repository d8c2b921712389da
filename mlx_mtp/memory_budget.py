"""What fits into a machine's memory: how many sequences, and what context each may have. Reads no device and no file.

`budget` decides for `plan`, `pairs`, `load`, `serve` and `doctor` alike. It takes weights and working memory off what
the machine lets a process use; what is left is for keys and values.

Working memory follows from the model's widths and is no share of the machine: what a prompt chunk's widest layer holds,
attention scores, the logits of the widest round, and MLX's own buffers. The factors are peaks measured on a CPU
(`bench/memory.py`). A GPU's peak has not been measured; there scores count twice, and buffers in flight on top.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.models.config import PassSize
from mlx_mtp.models.families import TargetConfig
from mlx_mtp.rows import RequestError

USEFUL_CONTEXT = 8192  # tokens of prompt and output that a sequence has to hold, or the model's own context
MAX_NUM_SEQS = 8
GPU_CHUNK, LEAST_CHUNK = 2048, 512  # tokens of a prompt chunk on a GPU
CHUNK_SHARE = 0.2  # of what the weights leave: chunks are halved until their pass takes no more
SCORE_BYTES = 256 * 2**20  # attention scores of a full layer; no chunk may need more (see `score_chunk`)
# Of the logits of a round: 1.3 measured with the default sampling, 3.5 with penalties. top_p without top_k takes 10.6,
# which is as much up to 5 drafts a sequence.
LOGIT_COPIES = 4


@dataclass(frozen=True)
class Device:
    """What passes take on one. number_bytes: of an activation. score_copies: of attention scores that are there at
    once. runtime_bytes: MLX's command buffers and heaps, and freed buffers that it holds back."""

    number_bytes: int
    score_copies: int
    runtime_bytes: int


GPU = Device(2, 2, 256 * 2**20)
CPU = Device(4, 1, 0)


@dataclass(frozen=True)
class PairSize:
    """What a target and its drafter take, known before a weight is read.

    target_bytes, drafter_bytes: of weights in memory. seq_bytes: tokens -> bytes of a sequence's cache in both.
    pass_size, hidden_size, vocab_size, context_len: of the target. num_aux_layers: layers whose outputs the drafter
    reads. drafter_saves: bytes that packing the drafter into 4 bits would save.
    """

    target_bytes: int
    drafter_bytes: int
    seq_bytes: Callable[[int], int]
    pass_size: PassSize
    hidden_size: int
    vocab_size: int
    context_len: int
    device: Device = GPU
    num_aux_layers: int = 0
    drafter_saves: int = 0

    @property
    def useful_context(self) -> int:
        """The shortest context worth a sequence."""
        return min(USEFUL_CONTEXT, self.context_len)

    def chunk_bytes(self, chunk: int, context: int | None = None) -> int:
        """Activations and attention scores of a prompt chunk of so many tokens, after no more than `context` in all."""
        p, size = self.pass_size, self.device.number_bytes
        activations = chunk * (p.token_numbers + self.num_aux_layers * self.hidden_size) * size
        per_key = self.device.score_copies * p.heads * chunk * size
        full = SCORE_BYTES if context is None else min(SCORE_BYTES, per_key * context)
        return activations + max(full, per_key * (p.window + chunk) if p.window else 0)

    def working_bytes(self, chunk: int, num_seqs: int, context: int | None = None) -> int:
        """What passes hold besides weights and caches: a prompt chunk, or the logits of a round of so many sequences.

        One follows the other, also where a round and a chunk go in one pass. context: of the longest sequence; None is
        any.
        """
        logits = LOGIT_COPIES * num_seqs * (MAX_WIDTH + 1) * self.vocab_size * 4
        return max(self.chunk_bytes(chunk, context), logits) + self.device.runtime_bytes

    def tokens_in(self, budget_bytes: int) -> int:
        """The most tokens a sequence may have within so many bytes; 0 if it cannot begin."""
        return bisect.bisect_right(range(1, self.context_len + 1), budget_bytes, key=self.seq_bytes)

    def score_chunk(self, start: int) -> int:
        """The longest prompt chunk after `start` tokens whose scores in a full layer stay within SCORE_BYTES, where MLX
        has no fused attention for it."""
        d = self.device
        pairs = SCORE_BYTES // (d.score_copies * self.pass_size.heads * d.number_bytes)  # of a query and a key
        return max(1, (math.isqrt(start * start + 4 * pairs) - start) // 2)


def size_of(config: TargetConfig, target_bytes: int, drafter_bytes: int, seq_bytes: Callable[[int], int]) -> PairSize:
    """A pair by its target's config, in bfloat16."""
    return PairSize(
        target_bytes,
        drafter_bytes,
        seq_bytes,
        config.pass_size,
        config.hidden_size,
        config.vocab_size,
        config.max_positions,
    )


@dataclass(frozen=True)
class Room:
    """What a machine gives and a user asks for.

    usable_bytes: for everything. chunk: the longest prompt chunk. least_chunk: down to which it is halved where memory
    is short. kv_bytes: for keys and values; None is all that is left.
    """

    usable_bytes: int
    max_num_seqs: int = MAX_NUM_SEQS
    chunk: int = GPU_CHUNK
    least_chunk: int = LEAST_CHUNK
    kv_bytes: int | None = None


@dataclass(frozen=True)
class Budget:
    """How memory is shared out.

    working_bytes: of passes. window_bytes: of a sequence, whatever its length. kv_bytes: of all sequences and cached
    prefixes. num_seqs: at once. max_seq_len: tokens a sequence may have alone; fair_share_len: when all run. chunk: of
    prompts, in tokens. useful_context: below it a sequence is not worth having.
    """

    usable_bytes: int
    target_bytes: int
    drafter_bytes: int
    working_bytes: int
    window_bytes: int
    kv_bytes: int
    num_seqs: int
    max_seq_len: int
    fair_share_len: int
    chunk: int
    useful_context: int
    asked_kv: bool = False

    @property
    def fits(self) -> bool:
        """Whether at least one sequence of a useful context runs. A user's own limit may leave less."""
        spare = self.usable_bytes - self.target_bytes - self.drafter_bytes - self.working_bytes
        if self.asked_kv:
            return self.kv_bytes <= spare and self.max_seq_len > 0
        return self.max_seq_len >= self.useful_context

    def default_max_tokens(self, prompt_tok: int) -> int:
        """The most tokens that a request's output may have where it names no limit itself.

        Memory is reserved for the limit, so it decides how many requests run at once. A request takes its fair share,
        which leaves room for `num_seqs` of them, or half a useful context where its prompt leaves less of the share.
        """
        left = self.max_seq_len - prompt_tok
        return max(1, min(left, max(self.fair_share_len - prompt_tok, self.useful_context // 2)))

    def warnings(self, max_num_seqs: int) -> list[str]:
        """For the user: what is less than was asked for."""
        gb, useful = f"{self.kv_bytes / 1e9:.2f} GB", f"{self.useful_context:,} tokens"
        if self.max_seq_len < self.useful_context:
            return [f"{gb} for keys and values hold {self.max_seq_len:,} tokens of one sequence; {useful} are useful"]
        if self.num_seqs < max_num_seqs:
            return [
                f"{self.num_seqs} of {max_num_seqs} sequences run at once, so that each can hold {useful}: {gb} are "
                "left for keys and values"
            ]
        return []


def budget(pair: PairSize, room: Room) -> Budget:
    """Share out a machine's memory; `Budget.fits` says whether it is enough.

    Fewer sequences than asked for run where each would not hold a useful context; one always does.
    """
    left = room.usable_bytes - _weights(pair)
    chunk = room.chunk
    while chunk > room.least_chunk and pair.chunk_bytes(chunk) > CHUNK_SHARE * left:
        chunk //= 2
    useful = pair.seq_bytes(pair.useful_context)
    num_seqs = room.max_num_seqs
    while num_seqs > 1 and _kv_bytes(pair, room, chunk, num_seqs) < num_seqs * useful:
        num_seqs -= 1
    kv_bytes = _kv_bytes(pair, room, chunk, num_seqs)
    return Budget(
        usable_bytes=room.usable_bytes,
        target_bytes=pair.target_bytes,
        drafter_bytes=pair.drafter_bytes,
        working_bytes=pair.working_bytes(chunk, num_seqs),
        window_bytes=pair.seq_bytes(1),
        kv_bytes=kv_bytes,
        num_seqs=num_seqs,
        max_seq_len=pair.tokens_in(kv_bytes),
        fair_share_len=pair.tokens_in(kv_bytes // num_seqs),
        chunk=chunk,
        useful_context=pair.useful_context,
        asked_kv=room.kv_bytes is not None,
    )


def _kv_bytes(pair: PairSize, room: Room, chunk: int, num_seqs: int) -> int:
    if room.kv_bytes is not None:
        return room.kv_bytes
    return max(0, room.usable_bytes - _weights(pair) - pair.working_bytes(chunk, num_seqs))


def check(pair: PairSize, found: Budget, name: str) -> None:
    """Raise RequestError, with the figures and what would help, where a pair does not fit. name: of the target."""
    if found.fits:
        return
    weights, working, usable = (n / 1e9 for n in (_weights(pair), found.working_bytes, found.usable_bytes))
    taken = f"{name}: weights take {weights:.2f} GB (drafter {pair.drafter_bytes / 1e9:.2f}), passes {working:.2f}"
    if found.asked_kv:
        asked, least = found.kv_bytes / 1e9, found.window_bytes / 1e9
        if not found.max_seq_len:
            raise RequestError(f"the limit for keys and values is {asked:.3f} GB; {name} needs {least:.3f} at least")
        raise RequestError(
            f"{taken}, keys and values may take {asked:.2f}, and {usable:.2f} GB are usable; lower the limit for keys "
            "and values"
        )
    cache = pair.seq_bytes(found.useful_context) / 1e9
    raise RequestError(
        f"{taken}, {found.useful_context:,} tokens of one sequence {cache:.2f}: {weights + working + cache:.2f} GB, "
        f"and {usable:.2f} GB are usable; {_what_helps(pair, found)}"
    )


def _what_helps(pair: PairSize, found: Budget) -> str:
    short = pair.seq_bytes(found.useful_context) - found.kv_bytes
    saved = pair.drafter_saves
    if saved and found.kv_bytes and saved >= short:
        return f"--quantize-drafter 4 saves {saved / 1e9:.2f} GB, which is enough"
    helps = ["a copy in fewer bits", "a smaller model"]
    if saved:
        helps.insert(0, f"--quantize-drafter 4 (saves {saved / 1e9:.2f} GB, not enough alone)")
    elif pair.drafter_bytes > short and found.kv_bytes:
        helps.insert(0, f"--drafter none (saves {pair.drafter_bytes / 1e9:.2f} GB)")
    return f"use {', '.join(helps[:-1])} or {helps[-1]}"


def _weights(pair: PairSize) -> int:
    return pair.target_bytes + pair.drafter_bytes
