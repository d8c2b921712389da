"""The options that choose a pair and how it decodes, and what becomes of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_mtp.cli.app import Debug
from mlx_mtp.cli.output import progress, say
from mlx_mtp.rows import Sampling

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair
    from mlx_mtp.scheduler import Limits

EMBEDDED = "tiny"
ModelOption = Annotated[str, typer.Option("--model", "-m", help="A folder or hub id; tiny is the embedded pair.")]


KernelsOption = Annotated[
    str,
    typer.Option(
        metavar="auto|off|NAME,..",
        help="Metal kernels of this package: auto takes those that win on this machine, names also those that lose.",
    ),
]
TuningOption = Annotated[
    bool,
    typer.Option("--tuning/--no-tuning", help="On a Mac, set MLX's limits on command buffers and wired memory."),
]


@dataclass(frozen=True)
class Choice(Debug):
    """Which pair runs, and how it decodes."""

    model: ModelOption = EMBEDDED
    drafter: Annotated[
        str, typer.Option(help="A folder or hub id of any kind, auto (the target's own), lookup, auto+lookup, or none.")
    ] = "auto"
    quantize_drafter: Annotated[
        int | None, typer.Option(metavar="4|8", help="Quantise the drafter to so many bits at load.")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; unset = what suits the machine.")] = (
        None
    )
    width: Annotated[
        str,
        typer.Option(
            metavar="auto|heuristic|N",
            help="Tokens drafted per round; 0 is plain decoding. The text is the same.",
        ),
    ] = "auto"
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, help="Stop after so many; unset = the context's end."),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. This and the next: unset = the checkpoint's own.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set of this probability.")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the best.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Make tokens of prompt and text less likely; 1 is off.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Lower the logit of every token that stands in the text; 0 is off.")
    ] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for every time it stands there.")] = None
    seed: Annotated[
        int | None, typer.Option(help="With a seed the text depends on weights, prompt and seed alone.")
    ] = None
    kernels: KernelsOption = "auto"
    tuning: TuningOption = True
    profile: Annotated[
        bool, typer.Option("--profile", help="Time drafting apart from verifying; costs a wait a round.")
    ] = False


def sampling_changes(options: Choice) -> dict[str, Any]:
    """The sampling options that were given, checked before anything is loaded."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    names += ("repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := vars(options)[name]) is not None}
    Sampling(**given)
    return given


def parse_width(text: str) -> int | str:
    """The --width option, a number or a word, checked before anything is loaded."""
    from mlx_mtp.draft_length import make_policy

    try:
        width: int | str = int(text)
    except ValueError:
        width = text
    make_policy(width)
    return width


def load_pair(options: Choice, limits: Limits | None = None, prefix_bytes: int | None = None) -> Pair:
    from mlx_mtp.mlx_setup import Setup
    from mlx_mtp.pair import load

    with progress() as report:
        pair = load(
            options.model,
            options.drafter,
            quantize_drafter=options.quantize_drafter,
            dtype=options.dtype,
            limits=limits,
            prefix_bytes=prefix_bytes,
            report=report,
            setup=Setup(options.kernels, options.tuning),
        )
    if pair.kernels:
        say(f"kernels: {pair.kernels}")
    if options.profile:
        pair.profile()
    for warning in pair.warnings:
        say(f"warning: {warning}")
    return pair


def measure_costs(pair: Pair, options: Choice) -> None:
    """Measure what rounds cost, where that matters and is not known yet."""
    began_s = time.perf_counter()
    if options.width == "auto" and pair.measure_costs():
        say(f"measured once what drafts cost on this machine, in {time.perf_counter() - began_s:.1f} s")
