"""The emulator runs Metal as Metal would, and reports each planted bug as what it is."""

from dataclasses import replace

import metal_emu as emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import cuda, lint, samples
from metal_emu.samples import ARGMAX, PRODUCT, SEARCH

pytestmark = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))

U32 = mx.uint32
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(source, inputs, outputs, grid, threadgroup, **rest):
    """Runs a body with inputs a0.. and outputs o0.. [(shape, dtype)]; returns numpy arrays."""
    options = emu.Options(**rest.pop("options", {}))
    definition = {key: rest.pop(key) for key in ("header", "atomic_outputs", "ensure_row_contiguous") if key in rest}
    kernel = emu.metal_kernel(
        "t",
        [f"a{i}" for i in range(len(inputs))],
        [f"o{i}" for i in range(len(outputs))],
        source,
        options=options,
        **definition,
    )
    shapes, dtypes = [shape for shape, _ in outputs], [dtype for _, dtype in outputs]
    made = kernel(inputs=inputs, output_shapes=shapes, output_dtypes=dtypes, grid=grid, threadgroup=threadgroup, **rest)
    return [np.array(x) for x in made]


def kinds(*arguments, **named):
    """The kinds of what is reported about a body."""
    with pytest.raises(emu.EmulationError) as caught:
        run(*arguments, **named)
    return caught.value.kinds


def row(size, dtype=U32):
    return ((size,), dtype)


# ---- what Metal does ------------------------------------------------------------------------------


def test_threadgroups_at_the_edge_of_the_grid_are_smaller():
    source = """
    uint i = thread_position_in_grid.x + 10 * thread_position_in_grid.y;
    o0[i] = threads_per_threadgroup.x * 100 + dispatch_threads_per_threadgroup.x;
    o1[i] = threadgroup_position_in_grid.x + 10 * thread_index_in_threadgroup;
    """
    sizes, places = run(source, [], [((3, 10), U32), ((3, 10), U32)], (10, 3, 1), (4, 2, 1))
    assert sizes.tolist() == [[404] * 8 + [204] * 2] * 3
    assert (places[0, 8], places[1, 9], places[1, 5]) == (2, 2 + 10 * 3, 1 + 10 * 5)


LANE_FUNCTIONS = {
    "simd_sum(v)": lambda v: np.full(32, v.sum()),
    "simd_max(v) * 100 + simd_min(v)": lambda v: np.full(32, v.max() * 100 + v.min()),
    "simd_xor(v)": lambda v: np.full(32, np.bitwise_xor.reduce(v)),
    "simd_prefix_inclusive_sum(v)": lambda v: v.cumsum(),
    "simd_prefix_exclusive_sum(v)": lambda v: v.cumsum() - v,
    "simd_shuffle(v, 31 - l)": lambda v: v[::-1],
    "simd_shuffle_xor(v, 5)": lambda v: v[np.arange(32) ^ 5],
    "simd_shuffle_up(v, 3)": lambda v: np.concatenate([v[:3], v[:-3]]),
    "simd_shuffle_down(v, 5)": lambda v: np.concatenate([v[5:], v[-5:]]),
    "simd_shuffle_rotate_up(v, 3)": lambda v: np.roll(v, 3),
    "simd_shuffle_and_fill_up(v, v * 10, 2)": lambda v: np.concatenate([v[-2:] * 10, v[:-2]]),
    "simd_broadcast(v, 7)": lambda v: np.full(32, v[7]),
    "popcount((uint)(ulong)simd_ballot(v > 4))": lambda v: np.full(32, (v > 4).sum()),
    "simd_any(v > 8) * 2 + simd_all(v > 0)": lambda v: np.full(32, (v > 8).any() * 2 + 1),
    "quad_sum(v)": lambda v: v.reshape(8, 4).sum(1).repeat(4),
    "quad_shuffle_xor(v, 1)": lambda v: v[np.arange(32) ^ 1],
    "quad_broadcast(v, 2)": lambda v: v.reshape(8, 4)[:, 2].repeat(4),
}


def test_simdgroup_and_quadgroup_functions_compute_what_the_specification_says():
    values = np.random.default_rng(0).integers(1, 9, 32).astype(np.int32)
    body = "\n".join(f"o0[{32 * i} + l] = {call};" for i, call in enumerate(LANE_FUNCTIONS))
    source = f"uint l = thread_index_in_simdgroup; int v = a0[l];\n{body}"
    shape = (len(LANE_FUNCTIONS), 32)
    (got,) = run(source, [mx.array(values)], [(shape, mx.int32)], (32, 1, 1), (32, 1, 1))
    for line, (call, expected) in zip(got, LANE_FUNCTIONS.items(), strict=True):
        assert line.tolist() == expected(values).tolist(), call


def test_atomics_add_up_and_plain_additions_race():
    add = "atomic_fetch_add_explicit(&o0[thread_position_in_grid.x % 4], 1u, memory_order_relaxed);"
    (counts,) = run(add, [], [row(4)], (1000, 1, 1), (128, 1, 1), init_value=0, atomic_outputs=True)
    assert counts.tolist() == [250] * 4
    plain = "o0[thread_position_in_grid.x % 4] += 1u;"
    assert kinds(plain, [], [row(4)], (1000, 1, 1), (128, 1, 1), init_value=0) == ["race"]
    assert "uninitialised-read" in kinds(add, [], [row(4)], (64, 1, 1), (64, 1, 1), atomic_outputs=True)


def test_threadgroup_atomics_need_a_barrier_around_them():
    source = f"""
    threadgroup atomic_uint best[1];
    uint i = thread_index_in_threadgroup;
    if (i == 0) atomic_store_explicit(&best[0], 0u, memory_order_relaxed);
    {BARRIER}
    atomic_fetch_max_explicit(&best[0], i * 7 % 64, memory_order_relaxed);
    {BARRIER}
    o0[i] = atomic_load_explicit(&best[0], memory_order_relaxed);
    """
    (got,) = run(source, [], [row(64)], (64, 1, 1), (64, 1, 1))
    assert (got == 63).all()


def test_strided_inputs_and_row_contiguous_copies_read_the_same():
    view = mx.arange(24, dtype=mx.float32).reshape(4, 6).T
    source = """
    uint i = thread_position_in_grid.x, r = i / a0_shape[1], c = i % a0_shape[1];
    o0[i] = a0[r * a0_strides[0] + c * a0_strides[1]] + a0_ndim;
    """
    for contiguous in (False, True):
        (got,) = run(source, [view], [((6, 4), mx.float32)], (24, 1, 1), (24, 1, 1), ensure_row_contiguous=contiguous)
        assert (got == np.array(view) + 2).all()


def test_vectors_and_half_precision_round_as_metal_does():
    x = mx.random.normal((32, 4), key=mx.random.key(0)).astype(mx.float16)
    source = """
    uint i = thread_position_in_grid.x;
    half4 v = ((const device half4*)a0)[i];
    float4 f = float4(v) * 2 + float4(1, 2, 3, 4);
    f.xy += f.zw;
    o0[i] = dot(f, float4(1)) + float(v.w * v.x);
    o1[i] = as_type<uint>(f.x);
    """
    total, bits = run(source, [x], [row(32, mx.float32), row(32)], (32, 1, 1), (32, 1, 1))
    h = np.array(x)
    f = h.astype(np.float32) * 2 + np.array([1, 2, 3, 4], np.float32)
    f[:, :2] += f[:, 2:]
    assert np.allclose(total, f.sum(1) + (h[:, 3] * h[:, 0]).astype(np.float32), atol=1e-5)
    assert (bits == f[:, 0].view(np.uint32)).all()


def test_no_lane_order_changes_a_correct_kernel():
    source = f"""
    threadgroup float s[256];
    uint i = thread_index_in_threadgroup;
    s[i] = a0[i];
    {BARRIER}
    float t = 0;
    for (uint j = 0; j < 256; j++) t += s[(i + j) % 256];
    o0[i] = simd_sum(t);
    """
    x = mx.random.normal((256,), key=mx.random.key(1))
    outputs = [row(256, mx.float32)]
    results = [run(source, [x], outputs, (256, 1, 1), (256, 1, 1), options={"order": order})[0] for order in range(3)]
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


def test_patched_puts_the_emulator_under_mx_fast_metal_kernel():
    before = mx.fast.metal_kernel
    with emu.patched(order=1) as launches:
        assert mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
        kernel = mx.fast.metal_kernel(
            name="double",
            input_names=["x"],
            output_names=["y"],
            source="uint i = thread_position_in_grid.x; y[i] = x[i] * 2;",
        )
        y = kernel(
            inputs=[mx.arange(5)], output_shapes=[(5,)], output_dtypes=[mx.int32], grid=(5, 1, 1), threadgroup=(5, 1, 1)
        )[0]
    assert y.tolist() == [0, 2, 4, 6, 8]
    assert mx.fast.metal_kernel is before
    assert [k.definition.name for k in launches] == ["double"] and emu.bytes_read(launches, "x") == 20


# ---- what Metal refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "o0[0] = simd_sum((ulong)1);",  # no simdgroup functions on 64 bits
        "bfloat x = 1.0f; o0[0] = uint(x);",  # float to bfloat needs a cast
        "double x = 1; o0[0] = uint(x);",
        "o0[0] = std::max(1u, 2u);",
    ],
)
def test_what_metal_does_not_compile_is_not_compiled(source):
    with pytest.raises((emu.BuildError, emu.EmulationError)):
        run(source, [], [row(1)], (32, 1, 1), (32, 1, 1), options={"strict_writes": True})


# ---- ordering -------------------------------------------------------------------------------------


def test_a_simdgroup_barrier_orders_one_simdgroup_only():
    source = """
    threadgroup float s[64];
    uint i = thread_index_in_threadgroup;
    s[i] = i;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    o0[i] = s[i ^ X];
    """
    arguments = ([], [row(64, mx.float32)], (64, 1, 1), (64, 1, 1))
    assert run(source, *arguments, template=[("X", 1)])[0][0] == 1
    assert kinds(source, *arguments, template=[("X", 32)]) == ["race", "uninitialised-read"]
    without = source.replace("simdgroup_barrier(mem_flags::mem_threadgroup);", "")
    assert set(kinds(without, *arguments, template=[("X", 1)])) <= {"race", "uninitialised-read"}


def test_overwriting_what_others_still_read_is_a_race():
    source = """
    threadgroup float s[32];
    uint i = thread_index_in_threadgroup;
    float t = 0;
    for (int r = 0; r < 3; r++) {
      if (i < 32) s[i] = i + r;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      t += s[(i * 5) % 32];
      LAST
    }
    o0[i] = t;
    """
    arguments = ([], [row(64, mx.float32)], (64, 1, 1), (64, 1, 1))
    assert kinds(source.replace("LAST", ""), *arguments) == ["race"]
    run(source.replace("LAST", BARRIER), *arguments)


def test_nothing_orders_different_threadgroups_and_flags_name_the_memory():
    source = """
    uint i = thread_position_in_grid.x;
    o0[i] = i;
    threadgroup_barrier(mem_flags::mem_device);
    o1[i] = o0[(i + D) % 128];
    """
    outputs = [row(128), row(128)]
    assert "race" in kinds(source, [], outputs, (128, 1, 1), (64, 1, 1), template=[("D", 64)])
    wrong = source.replace("mem_device", "mem_threadgroup")
    assert kinds(wrong, [], outputs, (128, 1, 1), (128, 1, 1), template=[("D", 1)]) == ["race"]
    run(source, [], outputs, (128, 1, 1), (128, 1, 1), template=[("D", 1)])


def test_a_kernel_that_never_ends_is_stopped():
    source = "while (a0[thread_index_in_threadgroup] >= 0) { o0[0] = 1; }"
    assert kinds(source, [mx.zeros((32,))], [row(1)], (1, 1, 1), (1, 1, 1), options={"timeout_s": 0.3}) == ["timeout"]


# ---- the samples, right and with bugs planted -------------------------------------------------------

LOGITS = mx.random.normal((3, 5003), key=mx.random.key(1))
SLICES = mx.abs(mx.random.normal((5, 500), key=mx.random.key(2)))
WANTED = SLICES.sum(-1) * mx.array([0.0, 0.2, 0.5, 0.8, 0.99])
ROWS = mx.random.normal((4, 512), key=mx.random.key(3))
PACKED = mx.quantize(mx.random.normal((203, 512), key=mx.random.key(4)), 64, 4)


def argmax_is_right(kernel):
    return mx.array_equal(samples.argmax(kernel, LOGITS), mx.argmax(LOGITS, -1)).item()


def search_is_right(kernel):
    sums = np.cumsum(np.array(SLICES, dtype=np.float64), axis=1)
    found = np.array(samples.search(kernel, SLICES, WANTED))
    want = np.array(WANTED, dtype=np.float64)
    return all(
        sums[r, i] > w - 1e-4 and (i == 0 or sums[r, i - 1] <= w + 1e-4)
        for r, (i, w) in enumerate(zip(found, want, strict=True))
    )


def product_is_right(kernel):
    expected = ROWS @ mx.dequantize(*PACKED, 64, 4).T
    return mx.allclose(samples.product(kernel, ROWS, *PACKED), expected, atol=1e-3).item()


SAMPLES = [(ARGMAX, argmax_is_right), (SEARCH, search_is_right), (PRODUCT, product_is_right)]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("definition", "is_right"), SAMPLES, ids=lambda x: getattr(x, "name", ""))
def test_the_samples_are_right_and_nothing_is_reported(definition, is_right, order):
    assert is_right(samples.make(lambda **d: emu.metal_kernel(**d, options=emu.Options(order=order)), definition))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_argmax_takes_the_lowest_index_among_ties(dtype):
    x = LOGITS.astype(dtype)
    kernel = samples.make(emu.metal_kernel, ARGMAX)
    assert mx.array_equal(samples.argmax(kernel, x, threads=64), mx.argmax(x, -1))


def test_a_load_of_one_address_by_many_lanes_is_one_fetch_and_a_second_load_another():
    x = mx.arange(64, dtype=mx.float32)
    once = "o0[thread_index_in_threadgroup] = a0[3] + a0[thread_index_in_threadgroup];"
    again = """
    float t = 0;
    for (uint j = 0; j < N; j++) t += a0[thread_index_in_simdgroup ^ j];
    o0[thread_index_in_threadgroup] = t;
    """
    cases = ((once, 1, 64 * 4 * 2, 64 * 4 + 2 * 4), (again, 3, 64 * 4 * 3, 64 * 4 * 3))
    for source, count, read, fetched in cases:
        kernel = emu.metal_kernel("t", ["a0"], ["o0"], source, options=emu.Options(count_fetches=True))
        kernel(
            inputs=[x],
            template=[("N", count)],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )
        assert (emu.bytes_read([kernel], "a0"), emu.bytes_fetched([kernel], "a0")) == (read, fetched)


def test_a_dry_run_records_the_call_and_returns_zeros():
    with emu.patched(dry=True) as launches:
        kernel = samples.make(mx.fast.metal_kernel, replace(ARGMAX, source="this is no Metal"))
        assert samples.argmax(kernel, LOGITS).tolist() == [0, 0, 0]
    assert launches[0].call.grid == (256 * 3, 1, 1) and launches[0].statistics is None


def test_bytes_read_show_that_each_weight_is_read_once():
    kernel = samples.make(emu.metal_kernel, PRODUCT)
    assert product_is_right(kernel)
    traffic = kernel.statistics.buffers
    assert traffic["w"].read == traffic["w"].size == 203 * 512 // 2
    assert traffic["y"].written == traffic["y"].size


WRONG = "wrong result"
PLANTED = [  # what is wrong, kernel, part, old text, new text, what must be reported
    ("a barrier is missing", ARGMAX, "header", f"  {BARRIER}\n  Best all", "  Best all", "race"),
    ("a barrier orders no memory", ARGMAX, "header", "mem_flags::mem_threadgroup", "mem_flags::mem_none", "race"),
    ("a barrier is the simdgroup's", ARGMAX, "header", "threadgroup_barrier(", "simdgroup_barrier(", "race"),
    ("the last row reads one too many", ARGMAX, "source", "i < V; i += TG", "i <= V; i += TG", "out-of-bounds"),
    ("an offset is far off", ARGMAX, "source", "size_t(row) * V;", "size_t(row) * V * 4;", "out-of-bounds"),
    ("the guard of the last rows is missing", PRODUCT, "source", "if (n0 >= N) return;", "", "out-of-bounds"),
    ("rows beyond the end are written", PRODUCT, "source", "lane == 0 && r < rows", "lane == 0", "out-of-bounds"),
    (
        "half the lanes call simd_sum",
        PRODUCT,
        "source",
        "const float v = simd_sum(acc[m][r]);",
        "float v = 0; if (lane < 16) v = simd_sum(acc[m][r]);",
        "simd-divergence",
    ),
    (
        "lanes call simd_min a different number of times",
        SEARCH,
        "source",
        "const uint earliest = simd_min(mine);",
        "uint earliest = mine; for (uint i = 0; i < lane; i++) earliest = simd_min(earliest);",
        "simd-divergence",
    ),
    (
        "one thread returns before a simdgroup function",
        ARGMAX,
        "source",
        "threadgroup Best part[32];",
        "threadgroup Best part[32]; if (thread_index == 77) return;",
        "simd-divergence",
    ),
    (
        "a barrier stands in a branch",
        SEARCH,
        "source",
        "float running = upto - sum;",
        f"if (thread_index < 64) {BARRIER} float running = upto - sum;",
        "barrier-divergence",
    ),
    (
        "every simdgroup writes the result",
        ARGMAX,
        "source",
        "if (thread_index == 0) out[row] = best.index;",
        "if (lane == 0) out[row] = best.index + simdgroup;",
        "race",
    ),
    ("lanes share a slot", SEARCH, "source", "if (lane == 31) part[", "part[", "race"),
    (
        "threadgroups overlap and leave a tail",
        PRODUCT,
        "source",
        "simdgroup_index_in_threadgroup) * R",
        "simdgroup_index_in_threadgroup) * (R - 1)",
        "unwritten-output",
    ),
    ("slots nobody wrote are read", ARGMAX, "header", "if (lane < simdgroups) all", "all", "uninitialised-read"),
    ("an output is half written", PRODUCT, "source", "&& r < rows)", "&& r < rows && n0 < 100)", "unwritten-output"),
    ("an index leaves a thread's array", PRODUCT, "source", "acc[m][r] +=", "acc[m][r + 1] +=", "array-bounds"),
    ("a threadgroup array is too small", SEARCH, "source", "part[SIMDGROUPS]", "part[SIMDGROUPS - 1]", "array-bounds"),
    ("too much threadgroup memory", SEARCH, "source", "first[SIMDGROUPS];", "first[9000];", "threadgroup-memory"),
    ("lane 32 is asked for", ARGMAX, "header", "offset = 16", "offset = 32", "misuse"),
    (
        "a shuffle's delta differs between lanes",
        ARGMAX,
        "source",
        "if (thread_index == 0) out",
        "best.index += simd_shuffle_down(best.index, ushort(lane & 1)); if (thread_index == 0) out",
        "misuse",
    ),
    (
        "an input is written",
        ARGMAX,
        "source",
        "if (thread_index == 0) out",
        "if (thread_index == 0) ((device T*)x)[0] = 0; if (thread_index == 0) out",
        "write-to-const",
    ),
    ("the reduction is too narrow", ARGMAX, "header", "offset = 16", "offset = 8", WRONG),
    ("nibbles are read backwards", PRODUCT, "source", "(q >> (4 * j))", "(q >> (28 - 4 * j))", WRONG),
    ("the accumulator is not zeroed", PRODUCT, "source", "float acc[M][R] = {};", "float acc[M][R];", WRONG),
]


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug[0].replace(" ", "-"))
def test_a_planted_bug_is_reported_as_what_it_is(bug):
    _, definition, part, old, new, expected = bug
    text = getattr(definition, part)
    assert text.count(old) >= 1
    kernel = samples.make(emu.metal_kernel, replace(definition, **{part: text.replace(old, new)}))
    is_right = {d.name: check for d, check in SAMPLES}[definition.name]
    if expected == WRONG:
        assert not is_right(kernel)
        return
    with pytest.raises(emu.EmulationError) as caught:
        is_right(kernel)
    assert expected in caught.value.kinds
    assert definition.name in str(caught.value)


def test_a_report_quotes_the_line_and_names_the_thread():
    source = "uint i = thread_position_in_grid.x;\no0[i] =\n  a0[i + 1];"
    with pytest.raises(emu.EmulationError) as caught:
        run(source, [mx.arange(40)], [row(40, mx.int32)], (40, 1, 1), (40, 1, 1))
    (report,) = caught.value.reports
    assert report.message == "read of 4 bytes at a0[40], which has 40 elements (of 4 bytes)"
    assert report.lines == ("t:3: a0[i + 1];",)
    assert report.thread == "threadgroup (0,0,0) thread 39 [simdgroup 1 lane 7]"


def test_a_divergent_simdgroup_is_reported_with_who_waits_where():
    source = "uint i = thread_index_in_simdgroup;\nif (i >= 20) return;\no0[i] = simd_sum(i);"
    with pytest.raises(emu.EmulationError, match=r"Lanes 0-19: simd_sum line 3; 20-31: returned"):
        run(source, [], [row(32)], (32, 1, 1), (32, 1, 1))


# ---- the text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("template", [(("T", "float16"), ("N", 5), ("F", True), ("TG", 64)), ()])
def test_the_generated_text_is_mlx_s_own(template, atomic):
    source = """uint i = thread_position_in_grid.x;  // a_shape a_strides c_ndim threads_per_simdgroup
    o[i] = a[i] + n; p[i] = c[0];"""
    definition = emu.Definition("t", ("a", "n", "c"), ("o", "p"), source, "// helpers\n", atomic_outputs=atomic)
    inputs = (mx.zeros((3, 40)), mx.array(3), mx.zeros((7,), mx.bfloat16))
    template = tuple((name, mx.float16 if value == "float16" else value) for name, value in template)
    call = emu.Call(inputs, ((3,), (3,)), ("uint32", "float32"), (64, 1, 1), (64, 1, 1), template)
    assert call.generate(definition).text.strip() == emu.mlx_generated_text(definition, call).strip()


@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
def test_the_lint_sees_address_spaces_that_depend_on_the_size_of_an_input():
    pointer = replace(ARGMAX, source=ARGMAX.source.replace("auto x =", "const device T* x ="))
    for size, complains in ((1000, False), (5, True)):
        call = emu.Call(
            (mx.zeros((1, size)),), ((1,),), ("uint32",), (64, 1, 1), (64, 1, 1), (("T", mx.float32), ("TG", 64))
        )
        assert lint.complaints(ARGMAX, call) == []
        assert bool(lint.complaints(pointer, call)) == complains


@pytest.mark.skipif(lint.unavailable() is not None, reason=str(lint.unavailable()))
def test_the_lint_sees_pointers_without_an_address_space():
    bare = replace(ARGMAX, header=ARGMAX.header + "METAL_FUNC float first(float* p) { return p[0]; }\n")
    call = emu.Call((LOGITS,), ((3,),), ("uint32",), (64, 3, 1), (64, 1, 1), (("T", mx.float32), ("TG", 64)))
    assert any("no address space: float* p" in complaint for complaint in lint.complaints(bare, call))


@pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))
def test_a_kernel_compiles_for_cuda_and_a_broken_one_does_not():
    call = emu.Call((SLICES, WANTED), ((5,),), ("uint32",), (128 * 5, 1, 1), (128, 1, 1), (("V", 500), ("TG", 128)))
    cuda.compile_check([(SEARCH, call)])
    broken = replace(SEARCH, source=SEARCH.source.replace("simd_min(mine)", "simd_smallest(mine)"))
    with pytest.raises(emu.BuildError, match="simd_smallest"):
        cuda.compile_check([(broken, call)])
