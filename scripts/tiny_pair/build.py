"""The whole recipe: corpus -> tokenizer -> targets -> drafters -> evaluation -> the folders that ship; then DFlash.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python scripts/tiny_pair/build.py --work /tmp/tiny_pair

Needs torch and transformers (the `train` extra); about an hour on one x86 core with AVX-512 bf16. The same
machine, Python and library versions give the same weights; another standard library is another corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import corpus

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DESTINATIONS = {"edge": "mlx_mtp/data/tiny", "moe": "tests/fixtures/tiny_moe"}


def step(script: str, *arguments: str) -> None:
    """Runs one script of this folder and stops the build if it fails."""
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


def install(kind: str, work: Path) -> None:
    """Copies a finished pair to where it ships and writes its provenance."""
    destination = REPOSITORY / DESTINATIONS[kind]
    for part in ("target", "drafter"):
        shutil.copytree(work / kind / part, destination / part, dirs_exist_ok=True)
    if kind == "edge":
        shutil.copyfile(work / "prompts.json", destination / "prompts.json")
    (destination / "PROVENANCE.md").write_text(provenance(kind, work, destination))


def provenance(kind: str, work: Path, destination: Path) -> str:
    """PROVENANCE.md from the reports that the training and evaluation scripts left."""
    target, drafter, scores = (
        json.loads((work / kind / f"{name}.json").read_text())
        for name in ("target_report", "drafter_report", "evaluation")
    )
    plain, chat = corpus.documents(held_out=False)
    held_out, _ = corpus.documents(held_out=True)
    size = sum(map(len, plain)) / 1e6
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers", "numpy"))
    python = platform.python_version()
    lines = [
        f"# The tiny {kind} pair",
        "",
        "Trained from nothing by `scripts/tiny_pair`; no weight or text comes from a released model.",
        "",
        f"- Corpus: the standard library of CPython {python} without tests and generated tables: "
        f"{len(plain)} files, {size:.1f} MB, and {len(chat)} chat pairs cut from them. {len(held_out)} more "
        "files, chosen by a hash of their path, were held out; the shipped prompts come from those.",
        "- Licence of the corpus: PSF License Agreement, Copyright (c) 2001 Python Software Foundation. The "
        "weights can recite short pieces of it.",
        f"- Made with Python {python}, {libraries}; one CPU thread, seeded, driven by steps.",
        f"- Target: {target['parameters']:,} parameters, {target['steps']} steps, "
        f"{target['tokens']:,} tokens. Nats per token: {target['train_loss']} in training; held out "
        f"{target['held_out_loss']['256']} at length 256 and {target['held_out_loss']['768']} at 768.",
        f"- Drafter: {drafter['parameters']:,} parameters, {drafter['steps']} steps.",
        f"- Chat: {scores['chat_ended']} held-out requests end with `<turn|>` within 128 tokens.",
        "",
        *acceptance_table(scores),
        "",
        "| file | sha256 |",
        "|---|---|",
    ]
    for part in ("target", "drafter"):
        path = destination / part / "model.safetensors"
        lines.append(f"| {part}/model.safetensors | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |")
    lines += [
        "",
        "Again: `OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python scripts/tiny_pair/build.py --work DIR`",
        "",
    ]
    return "\n".join(lines)


def acceptance_table(scores: dict) -> list[str]:
    """Markdown rows: accepted drafts per round, transformers, greedy, fp32."""
    lines = [
        "Accepted drafts per round on held-out prompts (transformers, greedy, fp32; tokens per round = +1):",
        "",
        "| prompts | width | accepted | by position | equal to plain decoding |",
        "|---|---|---|---|---|",
    ]
    names = {
        "code": "code, 64 tokens",
        "code_before_loops": "code, first 24 tokens",
    }
    for key, name in names.items():
        for width, row in scores[key].items():
            positions = " ".join(f"{x:.2f}" for x in row["by_position"])
            lines.append(f"| {name} | {width} | {row['accepted']:.2f} | {positions} | {row['identical']} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and reports")
    parser.add_argument("--install", choices=DESTINATIONS, help="train nothing: install this pair from --work")
    args = parser.parse_args()
    work = ("--work", str(args.work))
    if args.install:
        install(args.install, args.work)
        return
    step("tokenizer.py", *work)
    step("prompts.py", *work)
    for kind in DESTINATIONS:
        step("train_target.py", kind, *work)
        step("train_drafter.py", kind, *work)
        step("evaluate.py", kind, *work)
        install(kind, args.work)
    step("train_dflash.py", *work)
    step("evaluate_dflash.py", *work, "--install")


if __name__ == "__main__":
    main()
