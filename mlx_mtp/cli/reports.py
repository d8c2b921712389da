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
    """List the published targets with their drafters, and what of them fits into this machine's memory."""
    from mlx_mtp.doctor import memory_bytes
    from mlx_mtp.pairs import fits

    known = fits(memory_bytes())
    if options.as_json:
        print_json(
            [
                {
                    "target": pair.target,
                    "drafter": pair.drafter,
                    "quantised": pair.quantised,
                    "params": int(pair.params),
                    "weight_bytes": {str(bits): pair.weight_bytes(bits) for bits in (16, 8, 4)},
                    "fits_bits": bits,
                }
                for pair, bits in known
            ]
        )
        return
    rows = [
        (
            pair.target,
            pair.drafter,
            *(f"{pair.weight_bytes(bits) / 1e9:.1f}" for bits in (16, 8, 4)),
            f"{bits} bit" if bits else "no",
        )
        for pair, bits in known
    ]
    print_table(("target", "drafter (--drafter auto)", "GB, 16 bit", "8 bit", "4 bit", "fits here"), rows)


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
