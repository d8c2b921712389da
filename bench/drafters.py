"""Tokens per round of every drafter on held-out prompts and on one that asks for a text again.

    python bench/drafters.py                      # the embedded pair
    python bench/drafters.py --model FOLDER --drafter none lookup auto auto+lookup FOLDER
    python bench/drafters.py --auto               # the width policy instead of a fixed width

Counts and no times: the same whatever else the machine does. Greedy ones are the same everywhere; at temperature 1
every run draws other texts. `quantised` is the target's own copy at 4 bits as a draft model, in place of a smaller one,
and `dflash` the one trained for the embedded target. Prompts of every kind run together, in a batch.
"""

import argparse
import json
import tempfile
from importlib import resources
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

import mlx_mtp
from mlx_mtp import GREEDY, Sampling
from mlx_mtp.load import load_target
from mlx_mtp.quantized import quantize_now
from mlx_mtp.rows import Stats

DATA = resources.files("mlx_mtp") / "data" / "tiny"
DFLASH = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "tiny_dflash"


def edit_prompts(pair: mlx_mtp.Pair, codes: list[str], tokens: int) -> list[str]:
    """Each text as the target went on with it, and then begun again: what an editor asks for that wants it rewritten.
    (A model this small follows no request; but it copies.)"""
    done = pair.generate(codes, GREEDY, width=0, max_tokens=tokens)
    return [f"{code}{c.text}\n\n\n{code}" for code, c in zip(codes, done, strict=True)]


def quantised(model: str) -> str:
    """A folder with the target at 4 bits."""
    loaded = load_target(str(DATA / "target") if model == "tiny" else model, dtype=mx.float32)
    made = [(path, quantize_now(module, 4, mx.float32)) for path, module in loaded.model.named_modules()]
    loaded.model.update_modules(tree_unflatten([(path, module) for path, module in made if module is not None]))
    folder = Path(tempfile.mkdtemp(prefix="mlx-mtp-bench-"))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(loaded.model.parameters())))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (loaded.path / name).is_file():
            (folder / name).write_bytes((loaded.path / name).read_bytes())
    return str(folder)


def folder_of(drafter: str, model: str) -> str:
    """What --drafter calls it, as `load` takes it."""
    if drafter == "dflash":
        return str(DFLASH)
    return quantised(model) if drafter == "quantised" else drafter


def measure(pair: mlx_mtp.Pair, prompts: list, sampling: Sampling, width: int | str, tokens: int) -> Stats:
    """All prompts together; the sum of their counts."""
    total = Stats()
    for done in pair.generate(prompts, sampling, width, max_tokens=tokens):
        total.add(done.stats)
        total.generated_tokens -= 1  # the first token comes from the prompt
    total.generated_tokens += 1
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--drafter", nargs="+", default=["auto", "dflash", "quantised", "lookup", "auto+lookup"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--width", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--auto", action="store_true", help="let the policy choose the width")
    args = parser.parse_args()
    held_out = json.loads((DATA / "prompts.json").read_text())
    kinds: dict[str, list] = {"code": held_out["code"][: args.prompts]}
    kinds["chat"] = [[{"role": "user", "content": text}] for text in held_out["chat"][: args.prompts]]
    kinds["edit"] = edit_prompts(mlx_mtp.load(args.model, None), held_out["code"][: args.prompts], args.tokens)
    print("| drafter | width | sampling | " + " | ".join(kinds) + " |")
    print("|---" * (3 + len(kinds)) + "|")
    for drafter in args.drafter:
        name = folder_of(drafter, args.model)
        for width in ["auto"] if args.auto else args.width:
            for sampling in (GREEDY, Sampling(temperature=1.0)):
                cells = []
                pair = mlx_mtp.load(args.model, name)
                for prompts in kinds.values():
                    stats = measure(pair, prompts, sampling, width, args.tokens)
                    cells.append(f"{stats.tokens_per_round:.2f}")
                how = "greedy" if sampling.greedy else "T = 1"
                print(f"| {drafter} | {width} | {how} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
