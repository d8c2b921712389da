"""The trained pairs: what is shipped is what was recorded, its drafts are kept, and its text is the target's own."""

import hashlib
import json
import re
from pathlib import Path

import pytest

import mlx_mtp

ROOT = Path(__file__).resolve().parent.parent
EDGE, MOE = ROOT / "mlx_mtp" / "data" / "tiny", ROOT / "tests" / "fixtures" / "tiny_moe"
FOLDERS = pytest.mark.parametrize("folder", [EDGE, MOE], ids=["edge", "moe"])
PROMPTS = json.loads((EDGE / "prompts.json").read_text())


@FOLDERS
def test_the_weights_are_those_of_the_provenance_note(folder):
    noted = dict(re.findall(r"\| (\S+safetensors) \| `([0-9a-f]{64})`", (folder / "PROVENANCE.md").read_text()))
    assert set(noted) == {"target/model.safetensors", "drafter/model.safetensors"}
    for name, digest in noted.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@FOLDERS
def test_most_drafts_are_kept_on_text_that_nobody_trained_on(folder):
    pair = mlx_mtp.load(str(folder / "target"))
    prompts = PROMPTS["code"][:6]
    drafted = pair.generate(prompts, mlx_mtp.GREEDY, width=4, max_tokens=16)
    plain = pair.generate(prompts, mlx_mtp.GREEDY, width=0, max_tokens=16)
    assert [d.tokens for d in drafted] == [p.tokens for p in plain]
    kept, rounds = sum(d.stats.kept for d in drafted), sum(d.stats.rounds for d in drafted)
    assert kept / rounds > 1.4  # 2.2 were measured over 24 prompts; a wrong scale or hidden state gives under 1


def test_a_chat_request_is_answered_and_ended():
    pair = mlx_mtp.load("tiny")
    ask = [{"role": "user", "content": "Write `is_empty`: Return True if the queue is empty."}]
    done = pair.generate([ask], mlx_mtp.GREEDY, max_tokens=48)[0]
    assert done.finish_reason == "stop"
    assert done.text.startswith("def is_empty(self")


def test_both_pairs_fit_the_repository():
    assert sum(f.stat().st_size for folder in (EDGE, MOE) for f in folder.rglob("*")) < 16e6
