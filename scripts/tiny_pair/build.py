"""Trains the tiny models that ship with the project, one after another. README.md says what they are.

python -m scripts.tiny_pair.build --work DIR
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from . import data, train_dflash, train_mtp, train_target

TRAIN = {"target": train_target.train, "drafter": train_mtp.train, "dflash": train_dflash.train}
ORDER = ("edge_target", "edge_drafter", "edge_dflash", "moe_target", "moe_drafter")


def train_missing(work: Path, trial: bool) -> None:
    """Train what has no weights in `work` yet, on one thread.

    One process each: torch.compile keeps few versions of a function in a process and then falls back to others.
    """
    for name in ORDER:
        if not (work / f"{name}.safetensors").exists():
            kind, part = name.split("_")
            with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                pool.submit(TRAIN[part], kind, work, trial).result()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights; what is there is not redone")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--trial", action="store_true", help="a few steps each, to see that everything runs")
    mode.add_argument("--install", action="store_true", help="afterwards replace the shipped weights")
    args = parser.parse_args()
    work = args.work / "trial" if args.trial else args.work
    work.mkdir(parents=True, exist_ok=True)
    files, chat = data.documents()
    print(f"corpus: {len(files)} files, {sum(map(len, files)) / 1e6:.1f} MB, {len(chat)} chat pairs", flush=True)
    train_missing(work, args.trial)
    for name in ORDER:
        made, shipped = work / f"{name}.safetensors", data.FOLDERS[name] / "model.safetensors"
        same = "as shipped" if sha256(made) == sha256(shipped) else "not as shipped"
        print(f"{name} {sha256(made)} {same}")
        if args.install:
            shutil.copyfile(made, shipped)


if __name__ == "__main__":
    main()
