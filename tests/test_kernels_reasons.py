"""Kernels are compared with their references before they are used, and the list of them says what came of it."""

import metal_emu as emu
import mlx.core as mx
import pytest
from metal_emu import checks

from mlx_mtp import kernels
from mlx_mtp.doctor import Fact, facts

NAMES = {"rows_qmv", "gate_up", "head", "verdict", "experts", "attend", "delta"}
WRONG = [  # kernel, definition, old, new
    (
        "rows_qmv",
        "rows_qmv",
        "acc[m][r] = fma(scale[r], dot, acc[m][r]);",
        "acc[m][r] = fma(scale[0], dot, acc[m][r]);",
    ),
    (
        "rows_qmv",
        "rows_qmv",
        "fma(values[j], weights[r][j], dot)",
        "fma(values[M > 1 ? 7 - j : j], weights[r][M > 1 ? 7 - j : j], dot)",
    ),
    ("gate_up", "gate_up", "T(gelu_tanh(gate_sum) * up_sum)", "T(gelu_tanh(up_sum) * gate_sum)"),
    ("experts", "experts_combine", "j < TOP", "j < 1"),
    ("attend", "attend_join", "sum / weight", "sum"),
    ("delta", "delta", "kept + columns; n++", "columns; n++"),
    ("delta", "delta", "n == kept && !TAKES", "n == 0 && !TAKES"),
    ("head", "head_final", "i < top; i += 32", "i < 1; i += 32"),
    ("verdict", "verdict_judge", "kept[row] = int(matches) + 1", "kept[row] = int(L)"),
]

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))


@pytest.mark.skipif(mx.metal.is_available(), reason="there is Metal here")
def test_without_metal_no_kernel_is_used_and_each_says_why():
    assert kernels.check() == dict.fromkeys(NAMES, "this build of MLX has no Metal backend")
    assert {state for _, state, _ in kernels.report()} == {"not used"}
    assert not any(kernels.usable(name) for name in NAMES)


def test_doctor_lists_every_kernel():
    found = {fact.item: fact for fact in facts(kernels.report())}
    for name, state, reason in kernels.report():
        assert found[f"kernel {name}"] == Fact(f"kernel {name}", state, reason)


@emulated
def test_kernels_that_agree_with_their_references_are_used():
    with emu.patched(check=False) as launches:
        assert kernels.check() == dict.fromkeys(NAMES)
        count = len(launches)
        assert {(name, state) for name, state, _ in kernels.report()} == {(name, "used") for name in NAMES}
    assert len(launches) == count, "they are asked once"


@emulated
@pytest.mark.parametrize("kernel, definition, old, new", WRONG, ids=[f"{w[1]}-{i}" for i, w in enumerate(WRONG)])
def test_a_kernel_that_computes_something_else_is_not_used(kernel, definition, old, new):
    with emu.patched(check=False, edit=checks.planted(definition, "source", old, new)):
        found = kernels.check()
    assert [name for name in NAMES if found[name]] == [kernel]
    assert "reference" in found[kernel] or "rows beside it" in found[kernel]


@emulated
def test_a_kernel_that_does_not_compile_is_not_used():
    with emu.patched(
        check=False, edit=checks.planted("head_final", "source", "Best best = nobody();", "Best best = nobody(")
    ):
        found = kernels.check()
    assert found["head"].startswith("it fails on this device: ") and "\n" not in found["head"]
    assert found["verdict"] is None
