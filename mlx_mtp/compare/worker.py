"""A process that holds one runtime's models and runs what it is told: JSON lines in, JSON lines out.

The first line says what to load; then come jobs until stdin ends. Whatever the runtime prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.compare.runs import Mode, run
from mlx_mtp.rows import MlxMtpError, RequestError, one_line

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
MOST_SAID = 160  # characters of an error that is no line of ours


@dataclass(frozen=True)
class Load:
    """What a worker holds. target, drafter: folders. dtype: None keeps the checkpoint's. draft_model: for mlx-lm.
    kernels: ours, as --kernels takes them."""

    runtime: str
    target: str
    drafter: str | None
    dtype: str | None
    draft_model: str | None = None
    kernels: str = "auto"


@dataclass(frozen=True)
class Held:
    """A loaded runtime: its ways of decoding by name, and the margin of the target's choice after some tokens."""

    mode: Callable[[str], Mode]
    margin: Callable[[list[int]], float]


def load(what: Load) -> Held:
    """Raises MlxMtpError."""
    dtype = DTYPES[what.dtype] if what.dtype else None
    if what.runtime == "mlx-mtp":
        return _ours(what, dtype)
    if what.runtime == "mlx-lm":
        return _mlx_lm(what, dtype)
    assert what.runtime == "mlx-vlm", what.runtime
    return _mlx_vlm(what, dtype)


def _ours(what: Load, dtype: mx.Dtype | None) -> Held:
    from mlx_mtp.compare.ours import Ours, margin
    from mlx_mtp.few_rows import Trial
    from mlx_mtp.load import load_pair
    from mlx_mtp.mlx_setup import Tuned, prepare

    prepare()
    loaded = load_pair(what.target, what.drafter, dtype=dtype, trial=Trial.of(what.kernels))
    Tuned()  # until the process ends
    modes: dict[str, Ours] = {}

    def mode(name: str) -> Ours:
        if name not in modes:
            modes[name] = Ours(loaded, int(name) if name.isdigit() else name)
        return modes[name]

    return Held(mode, lambda tokens: margin(loaded, tokens))


def _mlx_lm(what: Load, dtype: mx.Dtype | None) -> Held:
    from mlx_mtp.compare import mlx_lm

    model = mlx_lm.load(Path(what.target), dtype)
    draft_model = mlx_lm.load(Path(what.draft_model), dtype) if what.draft_model else None

    def mode(name: str) -> Mode:
        if name == "plain":
            return mlx_lm.Plain(model)
        return mlx_lm.WithDraftModel(model, draft_model, int(name))

    return Held(mode, _no_margin)


def _mlx_vlm(what: Load, dtype: mx.Dtype | None) -> Held:
    from mlx_mtp.compare import mlx_vlm

    assert what.drafter is not None
    pair = mlx_vlm.load(Path(what.target), Path(what.drafter), dtype)
    return Held(lambda name: mlx_vlm.MlxVlm(pair, None if name == "plain" else int(name)), _no_margin)


def _no_margin(tokens: list[int]) -> float:
    raise RequestError("only this package is asked for margins")


def answer(held: Held, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job: "run" or "margin"."""
    if job["do"] == "margin":
        return {"margin": held.margin(job["tokens"])}
    mode, prompts = held.mode(job["mode"]), [tuple(prompt) for prompt in job["prompts"]]
    return run(mode, prompts, job["tokens"]).to_json()


def _line(error: Exception) -> str:
    """The beginning of what it says, in one line: some runtimes list every weight that they miss."""
    said = one_line(error)
    return said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]} ..."


def main() -> None:
    """Speak the protocol. The file descriptor of stdout is kept for it alone; prints of others go to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lines = iter(sys.stdin.readline, "")
    try:
        held = load(Load(**json.loads(next(lines))))
        replies.write(json.dumps({"ready": True}) + "\n")
        for line in lines:
            replies.write(json.dumps(answer(held, json.loads(line))) + "\n")
    except MlxMtpError as error:
        replies.write(json.dumps({"error": str(error)}) + "\n")
    except Exception as error:  # whatever a runtime does: the parent says which one, and goes on without it
        replies.write(json.dumps({"error": f"{type(error).__name__}: {_line(error)}"}) + "\n")
        raise


if __name__ == "__main__":
    main()
