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
    """List published targets with their drafters: what they take, what is here, and what fits into this memory."""
    from mlx_mtp.doctor import memory_bytes
    from mlx_mtp.hub import on_disk_bytes
    from mlx_mtp.pairs import offers

    memory, disk = memory_bytes(), {}
    for offer in offers():
        disk |= {name: on_disk_bytes(name) for name in (offer.target, offer.drafter) if name not in disk}
    found = [
        (offer, sum(disk[name] for name in {offer.target, offer.drafter}), offer.fits(memory)) for offer in offers()
    ]
    if options.as_json:
        print_json(
            [
                asdict(o) | {"weight_bytes": o.weight_bytes, "on_disk_bytes": size, "fits": fits}
                for o, size, fits in found
            ]
        )
        return
    rows = [
        (
            o.target,
            o.drafter,
            o.kind,
            str(o.bits),
            f"{o.weight_bytes / 1e9:.1f}" + ("" if o.drafter_params else " and the drafter's"),
            f"{size / 1e9:.1f}" if size else "-",
            "yes" if fits else "no",
        )
        for o, size, fits in found
    ]
    print_table(("target (-m)", "drafter (--drafter)", "kind", "bits", "GB", "GB on disk", "fits here"), rows)


@command
def doctor(options: Report) -> None:
    """Show what this machine has, what of it is used, what is not, and why."""
    from mlx_mtp import kernels
    from mlx_mtp.doctor import facts

    found = facts(kernels.report())
    if options.as_json:
        print_json([asdict(fact) for fact in found])
    else:
        print_table(("item", "state", "reason"), [(fact.item, fact.state, fact.reason) for fact in found])
