"""What the trained DFlash drafter keeps on the held-out prompts, by counts, in mlx_mtp itself; and its installation.

python scripts/tiny_pair/evaluate_dflash.py --work DIR [--install]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

import mlx_mtp

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET, PROMPTS = (REPOSITORY / "mlx_mtp" / "data" / "tiny" / name for name in ("target", "prompts.json"))
DESTINATION = REPOSITORY / "tests" / "fixtures" / "tiny_dflash"
WIDTHS = (2, 4, 7)
ROWS = 8
SETTINGS = {
    "greedy, 64 tokens": (mlx_mtp.GREEDY, 64),
    "greedy, first 24 tokens": (mlx_mtp.GREEDY, 24),
    "temperature 1, seeds, 64 tokens": (mlx_mtp.Sampling(temperature=1.0, seed=1), 64),
    "temperature 1, no seeds, 64 tokens": (mlx_mtp.Sampling(temperature=1.0), 64),
}


def kept(pair: mlx_mtp.Pair, prompts: list[str], sampling: mlx_mtp.Sampling, tokens: int, width: int) -> dict:
    """Tokens a round, and the share of rounds in which each position was kept."""
    done = []
    for at in range(0, len(prompts), ROWS):
        done += pair.generate(prompts[at : at + ROWS], sampling, width=width, max_tokens=tokens)
    rounds = sum(d.stats.rounds for d in done)
    hits, tries = [0] * width, [0] * width
    for stats in (d.stats for d in done):
        for i, (hit, tried) in enumerate(zip(stats.kept_at, stats.drafted_at, strict=True)):
            hits[i] += hit
            tries[i] += tried
    return {
        "tokens_per_round": round(sum(d.stats.generated_tokens - 1 for d in done) / rounds, 2),
        "by_position": [round(h / t, 2) if t else 0.0 for h, t in zip(hits, tries, strict=True)],
    }


def evaluate(drafter: Path) -> dict:
    """The table for every setting and width, over the held-out code prompts."""
    prompts, table = json.loads(PROMPTS.read_text())["code"], {}
    for name, path in {"DFlash": str(drafter), "MTP": "auto"}.items():
        pair = mlx_mtp.load(str(TARGET), path)
        for setting, (sampling, tokens) in SETTINGS.items():
            for width in WIDTHS:
                row = table.setdefault(f"{setting}|{width}", {})
                row[name] = kept(pair, prompts, sampling, tokens, width)
                print(name, setting, width, row[name], flush=True)
    return table


def provenance(report: dict, table: dict) -> str:
    """PROVENANCE.md."""
    digest = hashlib.sha256((DESTINATION / "model.safetensors").read_bytes()).hexdigest()
    lines = [
        "# The tiny DFlash drafter",
        "",
        "Distilled from `mlx_mtp/data/tiny/target` by `scripts/tiny_pair/train_dflash.py`; corpus, tokenizer and "
        "licence are that target's (`mlx_mtp/data/tiny/PROVENANCE.md`). The layout is that of z-lab's drafters for "
        "Gemma 4.",
        "",
        f"- {report['parameters']:,} parameters, {report['steps']} steps, {report['cpu_minutes']} CPU minutes on one "
        f"thread; seeded. Made with {report['libraries']}; counted with mlx {version('mlx')}.",
        f"- `model.safetensors` `{digest}`",
        "",
        "Tokens a round on the held-out code prompts, in `mlx_mtp` (float32, CPU), the embedded MTP drafter beside it; "
        "shares are DFlash's, of rounds in which the position was drafted:",
        "",
        "| setting | width | DFlash | kept by position | MTP |",
        "|---|---|---|---|---|",
    ]
    for key, row in table.items():
        setting, width = key.split("|")
        shares = " ".join(f"{x:.2f}" for x in row["DFlash"]["by_position"])
        dflash, mtp = (row[name]["tokens_per_round"] for name in ("DFlash", "MTP"))
        lines.append(f"| {setting} | {width} | {dflash:.2f} | {shares} | {mtp:.2f} |")
    again = (
        "python scripts/tiny_pair/train_dflash.py --work DIR && python scripts/tiny_pair/evaluate_dflash.py --work DIR"
    )
    return "\n".join([*lines, "", f"Again: `{again} --install`", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that train_dflash.py worked in")
    parser.add_argument("--install", action="store_true", help="copy the drafter to where it ships, with its note")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    folder = args.work / "dflash"
    table = evaluate(folder / "drafter")
    (folder / "evaluation.json").write_text(json.dumps(table, indent=1) + "\n")
    if args.install:
        shutil.copytree(folder / "drafter", DESTINATION, dirs_exist_ok=True)
        report = json.loads((folder / "report.json").read_text())
        (DESTINATION / "PROVENANCE.md").write_text(provenance(report, table))


if __name__ == "__main__":
    main()
