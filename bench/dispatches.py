"""How many dispatches a step has on Metal, with MLX's own operations and with the kernels; counted, never run.

    python bench/dispatches.py [--detail 26B-A4B]

The graph of a step at the published sizes is built from weights that take no memory, and its primitives are counted:
those that only look at memory another way are none, every other one is one (MLX needs two or more for some sorts and
long reductions). RMSNorm, RoPE, dequantising and the attention that MLX fuses are one each, as they are on Metal. A
drafter step is what drafting three tokens has more than drafting two.
"""

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_mtp.accept import verdict
from mlx_mtp.cache import Cache
from mlx_mtp.drafters.mtp import MtpDrafter
from mlx_mtp.few_rows import use_kernels
from mlx_mtp.kernels import trials
from mlx_mtp.models.config import FULL, SLIDING, read_assistant, read_target
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.quantized import Packing, packed_module
from mlx_mtp.rows import GREEDY, Draft, Forward
from mlx_mtp.sampling import RowSampler, Sampler

CONTEXT, MAX_WIDTH = 1536, 7
VIEWS = frozenset(
    ("AsStrided", "Broadcast", "BroadcastAxes", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze")
    + ("StopGradient", "Transpose", "Unflatten", "View")
)
NODE = re.compile(r'\[label ="([^"]+)"')
FUSED_SIZES, FUSED_QUERIES, FUSED_HEADS = (64, 96, 128, 192, 256), 8, 32  # of MLX 0.32's attention for few queries


@dataclass(frozen=True)
class Size:
    """What the configs of a published pair say; drafter: hidden size, MLP, query heads."""

    hidden: int
    layers: int
    every: int  # a full layer after so many
    mlp: int
    heads: int
    kv: tuple[int, int]  # sliding, full
    shared: int
    ple: int
    drafter: tuple[int, int, int]
    moe: bool = False


SIZES = {
    "E2B": Size(1536, 35, 5, 6144, 8, (1, 1), 20, 256, (256, 2048, 4)),
    "E4B": Size(2560, 42, 6, 10240, 8, (2, 2), 18, 256, (256, 2048, 4)),
    "12B": Size(3840, 48, 6, 15360, 16, (8, 1), 0, 0, (1024, 8192, 16)),
    "26B-A4B": Size(2816, 30, 6, 2112, 16, (8, 2), 0, 0, (1024, 8192, 16), moe=True),
    "31B": Size(5376, 60, 6, 21504, 32, (16, 4), 0, 0, (1024, 8192, 32)),
}


def configs(size: Size) -> tuple[dict, dict]:
    """config.json of target and drafter, as far as they decide the graph."""
    big = size.ple == 0
    text = {
        "vocab_size": 262144,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "layer_types": [FULL if i % size.every == size.every - 1 else SLIDING for i in range(size.layers)],
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv[0],
        "num_global_key_value_heads": size.kv[1],
        "attention_k_eq_v": big,
        "sliding_window": 1024 if big else 512,
        "num_kv_shared_layers": size.shared,
        "hidden_size_per_layer_input": size.ple,
        "final_logit_softcapping": 30.0,
        "enable_moe_block": size.moe,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    }
    hidden, mlp, heads = size.drafter
    small = text | {"hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads}
    small |= {"num_hidden_layers": 4, "layer_types": [SLIDING] * 3 + [FULL], "enable_moe_block": False}
    small |= {"num_kv_shared_layers": 4, "final_logit_softcapping": None}
    drafter = {"model_type": "gemma4_assistant", "text_config": small, "backbone_hidden_size": size.hidden}
    return {"model_type": "gemma4", "text_config": text}, drafter | {"use_ordered_embeddings": not big}


# arrays that are never computed ---------------------------------------------------------------------------


def hollow(x: mx.array) -> mx.array:
    """An evaluated array of the same shape that takes the memory of one number."""
    return _hollow(x.shape, x.dtype)


def _hollow(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Always a new one: of two products with the same array, compiled graphs keep one."""
    made = mx.broadcast_to(mx.array(0, dtype), shape)
    mx.eval(made)
    return made


def empty(model: nn.Module, bits: int) -> nn.Module:
    """A network whose weights are hollow, packed to so many bits."""
    made = []
    for path, module in model.named_modules():
        weight = module.get("weight")
        if bits < 16 and weight is not None and weight.ndim > 1 and not module.children():
            made.append((path, packed_module(module, Packing("affine", bits, 64), False, mx.bfloat16)))
    model.update_modules(tree_unflatten(made))
    model.set_dtype(mx.bfloat16)
    model.update(tree_map(hollow, model.parameters()))
    return model


def one(x: mx.array, *others: mx.array | None) -> mx.array:
    """x behind a single primitive that needs the others too."""
    return mx.depends([x], [other for other in others if other is not None] or [x])[0]


def kernel(**definition: object):
    """In the place of mx.fast.metal_kernel: every call is one primitive."""

    def call(*, inputs, output_shapes, output_dtypes, **launch: object) -> list[mx.array]:
        made = [_hollow(tuple(shape), dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        return mx.depends(made, list(inputs))

    return call


@contextlib.contextmanager
def as_on_metal(kernels: bool) -> Iterator[None]:
    """Graphs built inside have one primitive where Metal has one operation. kernels: all of ours are used."""
    attention = mx.fast.scaled_dot_product_attention

    def attend(q: mx.array, k: mx.array, v: mx.array, **options) -> mx.array:
        grouped = q.shape[2] * (q.shape[1] // k.shape[1])
        if q.shape[3] in FUSED_SIZES and q.shape[2] <= FUSED_QUERIES and grouped <= FUSED_HEADS:
            return one(q, k, v, options.get("mask"))
        return attention(q, k, v, **options)

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array | None = None, **how) -> mx.array:
        shape = (*w.shape[:-1], w.shape[-1] * 32 // how["bits"])
        return one(_hollow(shape, how.get("dtype", scales.dtype)), w, scales, biases)

    outcome = dict.fromkeys(trials.KERNELS, None if kernels else "not counted")
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (mx.fast, "rms_norm", lambda x, weight, eps: one(x, weight)),
            (mx.fast, "rope", lambda x, *rest, offset, **options: one(x, offset)),
            (mx.fast, "scaled_dot_product_attention", attend),
            (mx, "dequantize", dequantize),
            (mx.fast, "metal_kernel", kernel),
            (mx.metal, "is_available", lambda: True),
            (mx, "default_device", lambda: mx.Device(mx.gpu)),
            (trials, "_outcomes", lambda factory: outcome),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


# counting -------------------------------------------------------------------------------------------------


class _Text(list):
    def write(self, text: str) -> None:
        self.append(text)


def primitives(*trees: object) -> Counter[str]:
    """Dispatches by the name of their primitive; evaluated arrays are the leaves."""
    drawing = _Text()
    mx.export_to_dot(drawing, *(x for tree in trees for _, x in tree_flatten([tree]) if isinstance(x, mx.array)))
    return Counter(name for name in NODE.findall("".join(drawing)) if name not in VIEWS)


@dataclass(frozen=True)
class Networks:
    target: Gemma4
    assistant: Assistant


def networks(size: Size, bits: int) -> Networks:
    target, drafter = configs(size)
    made = Gemma4(read_target(target, "target")), Assistant(read_assistant(drafter, "drafter"))
    for model in made:
        empty(model, bits)
        use_kernels(model)
    return Networks(*made)


def filled(target: Gemma4, rows: int) -> Cache:
    """A cache with rows that hold CONTEXT positions."""
    cache = Cache(target.specs, MAX_WIDTH, mx.bfloat16)
    for _ in range(rows):
        cache.join(CONTEXT + MAX_WIDTH + 1)
    cache.bounds = [CONTEXT] * rows
    cache.restore(tree_map(hollow, cache.state()))
    return cache


def round_of(made: Networks, width: int, rows: int = 1, drafts: bool = True) -> Counter[str]:
    """Dispatches of a greedy round of so many rows; drafts: False leaves the drafter's steps out."""
    cache, everyone = filled(made.target, rows), slice(0, rows)
    drafter, sampler = MtpDrafter(made.target, made.assistant, cache), Sampler([RowSampler.of(GREEDY)] * rows)
    drafter.restore(_hollow((rows, 1, made.target.config.hidden_size), mx.bfloat16))
    bonus, draft = _hollow((rows,), mx.int32), Draft(_hollow((rows, width), mx.int32))
    if width and drafts:
        draft = drafter.propose(everyone, bonus, sampler, width)
    tokens = mx.concatenate([bonus[:, None], draft.tokens], axis=1)
    pass_ = cache.open(everyone, width + 1)
    hidden, taps = made.target.forward(tokens, pass_)
    judged = verdict(draft, made.target.logits(hidden, capped=False), pass_.start, sampler, hidden)
    cache.commit(everyone, judged.kept, width + 1)
    drafter.observe(Forward(everyone, tokens, hidden, taps, width, judged.picked), judged.kept)
    return primitives(judged.tokens, judged.kept, judged.bonus, cache.state(), drafter.state())


@dataclass(frozen=True)
class Counts:
    plain: Counter[str]  # a target step of one column
    verify: Counter[str]  # of four
    draft: Counter[str]  # a drafter step
    round: Counter[str]  # of width 3


def counts(size: Size, bits: int, kernels: bool, rows: int) -> Counts:
    with as_on_metal(kernels):
        made = networks(size, bits)
        whole, verify = round_of(made, 3, rows), round_of(made, 3, rows, drafts=False)
        step = whole - verify
        step.subtract(round_of(made, 2, rows) - round_of(made, 2, rows, drafts=False))
        return Counts(round_of(made, 0, rows), verify, step, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4, help="of both networks")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--detail", choices=SIZES, help="list the primitives of one size")
    args = parser.parse_args()
    print(f"dispatches, {args.bits} bit, {args.rows} rows       MLX's operations -> the kernels")
    for name in args.sizes:
        before, after = (counts(SIZES[name], args.bits, kernels, args.rows) for kernels in (False, True))
        parts = ("plain", "verify", "draft", "round")
        cells = [f"{part} {vars(before)[part].total():5} -> {vars(after)[part].total():5}" for part in parts]
        print(f"{name:8} {'   '.join(cells)}", flush=True)
        if name == args.detail:
            for title, found in (("MLX's operations", before), ("the kernels", after)):
                print(f"  one column, {title}: {dict(found.plain.most_common())}")
                print(f"  drafter step, {title}: {dict(found.draft.most_common())}")


if __name__ == "__main__":
    main()
