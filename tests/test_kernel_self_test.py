"""A loaded model's kernels are built, compared and timed before they are used, and what fails or loses is not used."""

from pathlib import Path

import metal_emu as emu
import mlx.core as mx
import pytest
from macs import M4, MACS, pretended
from metal_emu import checks

from mlx_mtp import doctor
from mlx_mtp.kernels import self_test_cases as cases
from mlx_mtp.kernels.experts import Experts
from mlx_mtp.kernels.head import Clusters
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.kernels.self_test import KERNELS, Case, KernelChoice, Outcome, Record, report, self_test, summary, uses
from mlx_mtp.rows import RequestError

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

WRONG = [  # kernel, definition, old, new
    (
        "rows_qmv",
        "rows_qmv",
        "acc[m][r] = fma(scale[r], dot, acc[m][r]);",
        "acc[m][r] = fma(scale[0], dot, acc[m][r]);",
    ),
    (  # a row among others is summed in another order
        "rows_qmv",
        "rows_qmv",
        "fma(values[j], weights[r][j], dot)",
        "fma(values[M > 1 ? 7 - j : j], weights[r][M > 1 ? 7 - j : j], dot)",
    ),
    ("rows_qmv", "rows_qmv", "x + size_t(m0 + m) * K", "x + size_t(m0 + min(m, 6u)) * K"),
    ("gate_up", "gate_up", "T(gelu_tanh(gate_sum) * up_sum)", "T(gelu_tanh(up_sum) * gate_sum)"),
    (
        "gate_up",
        "gate_up",
        "fma(values[j], weights[r][j], dot)",
        "fma(values[M > 1 ? 7 - j : j], weights[r][M > 1 ? 7 - j : j], dot)",
    ),
    ("experts", "experts_combine", "j < TOP", "j < 1"),
    ("attend", "attend_join", "sum / weight", "sum"),
    ("attend", "attend_parts", "mine + WINDOW <= column", "mine + WINDOW < column"),
    (  # the queries of a second tile are summed from the last key to the first
        "attend",
        "attend_parts",
        "acc[i][d] = fma(share, float(tile[k * D + d * 32 + lane]), acc[i][d]);",
        "acc[i][d] = fma(simd_shuffle(weight, ushort(first < HELD * GROUPS ? k : TILE - 1 - k)), "
        "float(tile[(first < HELD * GROUPS ? k : TILE - 1 - k) * D + d * 32 + lane]), acc[i][d]);",
    ),
    ("delta", "delta", "kept + columns; n++", "columns; n++"),
    ("delta", "delta", "n == kept && !TAKES", "n == 0 && !TAKES"),
    ("head", "head_logits", "uint(ordering[members + r])", "uint(ordering[members])"),
    ("verdict", "verdict_judge", "kept[row] = int(matches) + 1", "kept[row] = int(L)"),
]


def matrix(seed: int, *shape: int) -> Matrix:
    return Matrix.quantized(mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16), 64, 4)


def small_cases() -> list[Case]:
    """One of every kernel."""
    ordering = mx.argsort(mx.random.uniform(shape=(512,), key=mx.random.key(1))).astype(mx.int32)
    plain = Matrix(mx.random.normal((40, 192)).astype(mx.bfloat16))
    return [
        cases.products("4 bit", [matrix(1, 40, 192)], mx.bfloat16),
        cases.products("plain", [plain], mx.bfloat16),
        cases.gates("plain", [(plain, plain)], mx.bfloat16),
        cases.gates("4 bit", [(matrix(1, 40, 192), matrix(2, 40, 192))], mx.bfloat16),
        cases.routed("4 bit", [Experts(*(matrix(i, 4, 64, 64) for i in range(3)))], 2, mx.bfloat16),
        cases.attention("ring", (4, 2), 64, 40, mx.bfloat16),
        cases.attention("full", (16, 2), 64, None, mx.bfloat16),
        cases.recurrence("4 heads", (2, 4), (48, 20)),
        cases.clustered("4 bit", Clusters(matrix(2, 32, 64), ordering, matrix(3, 512, 64), 8), mx.bfloat16),
        cases.verdicts("9000 tokens", 9000, 64, mx.bfloat16),
    ]


def tried(place: Path, kernels: str = "auto", wanted: list[Case] | None = None) -> tuple[Outcome, ...]:
    record = Record(place, lambda: ("a machine",))
    return self_test(small_cases() if wanted is None else wanted, KernelChoice.parse(kernels), record)


@pytest.mark.skipif(mx.metal.is_available(), reason="there is Metal here")
def test_without_metal_nothing_is_tried_and_the_report_says_why(tmp_path):
    assert tried(tmp_path) == () and not list(tmp_path.iterdir())
    lines = report(Record(tmp_path, lambda: ()))
    assert lines == tuple((name, "not used", "this build of MLX has no Metal backend") for name in KERNELS)


@emulated
def test_kernels_that_agree_with_their_references_are_used(tmp_path):
    with emu.patched(check=False):
        found = tried(tmp_path)
    assert {o.kernel for o in found} == set(KERNELS) and [o for o in found if o.reason] == []
    assert [o.ratio for o in found] == [None] * len(found), "an emulator's time says nothing"
    assert uses(found, "attend", "ring") and uses(found, "attend") and not uses(found, "attend", "another")


@emulated
@pytest.mark.parametrize("kernel, definition, old, new", WRONG, ids=[f"{w[1]}-{i}" for i, w in enumerate(WRONG)])
def test_a_kernel_that_computes_something_else_is_not_used(kernel, definition, old, new, tmp_path):
    with emu.patched(check=False, edit=checks.planted(definition, "source", old, new)):
        found = tried(tmp_path)
    assert {o.kernel for o in found if o.reason} == {kernel}
    assert all("reference" in o.reason or "the other rows" in o.reason for o in found if o.reason)


@emulated
def test_a_kernel_that_does_not_compile_is_not_used_and_the_others_are(tmp_path):
    edit = checks.planted(
        "head_logits", "source", "const float logit = simd_sum(mine);", "const float logit = simd_sum("
    )
    with emu.patched(check=False, edit=edit):
        found = {o.kernel: o.reason for o in tried(tmp_path)}
    assert found["head"].startswith("it fails on this device: ") and "\n" not in found["head"]
    assert found["verdict"] is None


# time -------------------------------------------------------------------------------------------------------


@emulated
def test_a_kernel_that_is_slower_than_mlx_is_not_used_unless_it_is_named(tmp_path):
    with pretended(launch_s=0.01):
        slow = tried(tmp_path)
        named = tried(tmp_path, "rows_qmv,attend")
        assert report(Record(tmp_path, lambda: ("a machine",)))[0][:2] == ("rows_qmv", "used")
    assert all(o.ratio > 1.05 and o.reason == f"it takes {o.ratio:.2f} times as long as MLX's own" for o in slow)
    assert {o.kernel for o in named} == {"rows_qmv", "attend"} and all(o.reason is None and o.ratio for o in named)
    assert "not used, head (4 bit): it takes" in summary(slow) and "rows_qmv (4 bit) " in summary(named)


def test_what_is_timed_reads_more_than_caches_hold_in_different_buffers():
    large = [Matrix(mx.broadcast_to(mx.array(0.0), (2048, 2048 + i))) for i in range(20)]  # 16 MB each, in no memory
    chain = [m for (m,) in cases._filling([(m,) for m in large])]
    assert len(chain) >= 8 and sum(m.weight.nbytes for m in chain) >= 128 * 2**20
    assert [m.columns for m in chain] == [2048 + i for i in range(len(chain))]
    small = [m for (m,) in cases._filling([(matrix(1, 8, 64),)])]
    assert len(small) == 64 and len({id(m.weight) for m in small}) == 64


@emulated
def test_times_are_taken_once_for_a_machine_and_its_kernels(tmp_path):
    wanted = small_cases()[:1]
    with pretended() as mac:
        first = tried(tmp_path, wanted=wanted)
        asked, launches = mac.asked, len(mac.launches)
        assert tried(tmp_path, wanted=wanted) == first and first[0].ratio == 1.0
        assert mac.asked == asked, "nothing is timed again"
        assert len(mac.launches) > launches, "what rounds need is built all the same"
        self_test(wanted, KernelChoice(), Record(tmp_path, lambda: ("another machine",)))
        assert mac.asked > asked
    assert len(list(tmp_path.iterdir())) == 2


@emulated
def test_a_record_that_is_torn_or_cannot_be_written_is_no_reason_to_stop(tmp_path):
    wanted = small_cases()[:1]
    with pretended():
        first = tried(tmp_path, wanted=wanted)
        (file,) = tmp_path.iterdir()
        for text in ("", "{", "[[1]]", '[["rows_qmv", "4 bit", null, "soon"]]', "17"):
            file.write_text(text)
            assert tried(tmp_path, wanted=wanted) == first
        assert tried(file / "below a file", wanted=wanted) == first


# what is chosen, and the report ------------------------------------------------------------------------------


def test_kernels_are_chosen_by_name():
    assert KernelChoice.parse("auto") == KernelChoice(frozenset(KERNELS)) and not KernelChoice.parse("off").names
    assert KernelChoice.parse("attend, head") == KernelChoice(frozenset(("attend", "head")), forced=True)
    for wrong in ("", "attends", "auto,head", "attend,"):
        with pytest.raises(RequestError, match="expected auto, off, or some of rows_qmv, gate_up"):
            KernelChoice.parse(wrong)


@emulated
def test_no_kernel_is_built_where_none_is_wanted(tmp_path):
    with emu.patched(check=False) as launches:
        assert tried(tmp_path, "off") == () and not launches
        assert {o.kernel for o in tried(tmp_path, "head")} == {"head"}
        assert {launch.definition.name.split("_")[0] for launch in launches} == {"head"}


@emulated
@pytest.mark.parametrize("mac", [M4, MACS[0]], ids=lambda mac: mac.brand)
def test_doctor_says_what_was_found_of_every_kernel(mac, tmp_path):
    with pretended(mac, launch_s=0.01):
        record = Record(tmp_path, lambda: ("a machine",))
        before = {f.item: f for f in doctor.facts(report(record))}
        self_test(small_cases()[:1], KernelChoice(), record)
        after = [f for f in doctor.facts(report(record)) if f.item == "kernel rows_qmv"]
    assert all(before[f"kernel {name}"].state == "not tried yet" for name in KERNELS)
    assert [f.state for f in after] == ["not used"]
    assert after[0].reason.startswith("4 bit: it takes ") and after[0].reason.endswith(" times as long as MLX's own")
