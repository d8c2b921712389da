"""`pairs` and `doctor`: what there is, and what of it this machine can use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from mlx_mtp.cli.app import Debug, command
from mlx_mtp.cli.output import print_json, print_table


@dataclass(frozen=True)
class Report(Debug):
    """The options of `pairs` and `doctor`."""

    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False


@command
def pairs(options: Report) -> None:
    """List published targets with their drafters: what they take, what is here, and what fits into this memory.

    Some copies with 4bit in their name hold their feed-forward layers at 8 bits and are larger and slower for it; the
    table says so. Where one with 4 bits throughout is published, take that.
    """
    from mlx_mtp.doctor import memory_bytes
    from mlx_mtp.hub import on_disk_bytes
    from mlx_mtp.pairs import offers
    from mlx_mtp.plan import offer_budget

    memory, disk = memory_bytes(), {}
    for offer in offers():
        disk |= {name: on_disk_bytes(name) for name in (offer.target, offer.drafter) if name not in disk}
    found = [
        (offer, sum(disk[name] for name in {offer.target, offer.drafter}), offer_budget(offer, memory))
        for offer in offers()
    ]
    if options.as_json:
        print_json(
            [
                asdict(o)
                | {"weight_bytes": o.weight_bytes, "uniform": o.uniform, "on_disk_bytes": size}
                | {"fits": b.fits, "num_seqs": b.num_seqs, "fair_share_len": b.fair_share_len}
                for o, size, b in found
            ]
        )
        return
    rows = [
        (
            o.target,
            o.drafter,
            o.kind,
            str(o.bits) if o.uniform else f"{o.bits}, MLPs {o.mlp_bits}",
            f"{o.weight_bytes / 1e9:.1f}" + ("" if o.drafter_params else " and the drafter's"),
            f"{size / 1e9:.1f}" if size else "-",
            f"{b.num_seqs} x {b.fair_share_len:,}" if b.fits else "no",
        )
        for o, size, b in found
    ]
    header = ("target (-m)", "drafter (--drafter)", "kind", "bits", "GB", "GB on disk", "fits here: at once x tokens")
    print_table(header, rows)


@command
def doctor(options: Report) -> None:
    """Show what this machine has, what of it is used, what is not, and why."""
    from mlx_mtp.doctor import Fact, facts, memory_bytes
    from mlx_mtp.few_rows import Trial
    from mlx_mtp.kernels.self_test import report
    from mlx_mtp.plan import what_fits

    found = [*facts(report(Trial.of().record)), *(Fact(*line) for line in what_fits(memory_bytes()))]
    if options.as_json:
        print_json([asdict(fact) for fact in found])
    else:
        print_table(("item", "state", "reason"), [(fact.item, fact.state, fact.reason) for fact in found])
