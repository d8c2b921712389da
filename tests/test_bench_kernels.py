"""The script that measures kernels on a GPU: its work list, its bytes, and its way from tensors to results on a CPU."""

import csv
import json
from dataclasses import replace

import kernel_cases
import kernels
import mlx.core as mx
import pytest

from mlx_mtp.doctor import on_gpu
from mlx_mtp.kernels.matrix import Matrix
from mlx_mtp.models.config import MoeConfig
from mlx_mtp.models.qwen3_5 import DeltaConfig
from mlx_mtp.shapes import shape

KERNELS = {"rows_qmv", "gate_up", "experts", "attend", "head", "verdict"}  # of a Gemma 4 target


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """The compiler would take longer than all that is computed here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def tiny_cases(layout: str) -> dict:
    """Every kernel's first case at a shape that takes no time."""
    found = shape("26B-A4B")
    layers = tuple(
        replace(layer, heads=4, kv_heads=2, head_dim=64, mlp_size=128, window=layer.window and 24)
        for layer in found.target.layers
    )
    target = replace(found.target, hidden_size=64, vocab_size=4096, layers=layers, moe=MoeConfig(4, 2, 64))
    text = replace(found.drafter.text, hidden_size=64)
    small = replace(found, target=target, drafter=replace(found.drafter, text=text, clusters=(2048, 32)))
    every = [
        *kernel_cases.cases(small, kernel_cases.LAYOUTS[layout], 40),
        kernel_cases.recurrence(DeltaConfig(2, 4, 32, 16, 4)),
    ]
    return {case.kernel: case for case in reversed(every)}


def test_the_work_list_has_every_kernel_at_every_size(capsys):
    assert kernels.main(["--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    for size, expected in {
        "31B": KERNELS - {"experts", "head"},
        "26B-A4B": KERNELS - {"head"},
        "E4B": KERNELS - {"experts"},
    }.items():
        assert {row[1] for row in rows if row[0] == size} == expected
    assert {row[1] for row in rows if row[0] == "Qwen3.5-4B"} == {"delta"}
    down = next(row for row in rows if row[:3] == ["31B", "rows_qmv", "down"])
    assert down[-2:] == ["65.082", "65.888"], "5376 x 21504 at 4.5 bits, and 1 or 16 rows in and out"


@pytest.mark.parametrize("layout", ["affine4", "affine8", "mxfp4", "mxfp8", "nvfp4", "bf16"])
def test_bytes_are_those_of_the_tensors(layout):
    how = kernel_cases.LAYOUTS[layout]
    dense = mx.ones((3, 128), mx.bfloat16)
    matrix = Matrix.quantized(dense, *how) if how else Matrix(dense)
    assert kernel_cases.weight_bytes(3, 128, how) == sum(t.nbytes for t in matrix.tensors)


def test_weights_drawn_in_parts_have_all_their_rows(monkeypatch):
    monkeypatch.setattr(kernel_cases, "SLICE_VALUES", 4 * 64)
    matrix = kernel_cases.drawn(3, (64, 4, "affine"), 10, 64)
    assert (matrix.rows, matrix.columns) == (10, 64)
    assert len({tuple(row) for row in matrix.weight.tolist()}) == 10
    x = kernel_cases.normal(1, 2, 64)
    want = x.astype(mx.float32) @ matrix.dense().T
    assert kernel_cases.difference([kernel_cases.exact_product(x, matrix)], [want]) < 1e-5


@pytest.mark.skipif(on_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2(capsys):
    assert kernels.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("no GPU: ") and said.err.count("\n") == 1


def test_on_an_nvidia_gpu_kernels_are_built_through_the_translation():
    before = mx.fast.metal_kernel
    with kernels.kernels_on("CUDA"):
        assert mx.metal.is_available() and mx.fast.metal_kernel.__module__ == "metal_emu.cuda"
    with kernels.kernels_on("Metal"):
        assert mx.fast.metal_kernel is before


@pytest.mark.parametrize("kernel", sorted({*KERNELS, "delta"}))
def test_both_sides_of_a_case_are_timed_and_compared_with_the_reference(kernel, tmp_path, capsys):
    case = tiny_cases("bf16" if kernel == "gate_up" else "affine4")[kernel]
    plan = kernels.Plan([1, 2], 2, 4.0 * case.holds, 64)
    lines = kernels.measure_all([("tiny", case)], plan, tmp_path / "out.csv", {"machine": "here"})
    assert [line.columns for line in lines] == [1, 2]
    for line in lines:
        assert line.copies == 4 and line.bytes == case.moves(line.columns)
        assert 0 < line.least_us <= line.us <= line.most_us and line.mlx_us > 0 and line.ratio > 0
        assert line.error < 0.01 and line.mlx_error < 0.01 and line.alone
        assert kernels.good(line) == on_gpu(), line.note  # elsewhere the reference stands in, and the line says so
    assert lines[0].ratio == lines[0].mlx_ratio == 1
    with (tmp_path / "out.csv").open() as file:
        assert [row["columns"] for row in csv.DictReader(file)] == ["1", "2"]
    assert json.loads((tmp_path / "out.json").read_text()) == {"machine": "here"}
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_operation_that_fails_is_a_note_and_the_other_side_is_timed():
    case = tiny_cases("affine4")["rows_qmv"]

    def broken(x: mx.array) -> list[mx.array]:
        raise RuntimeError("not there\non this device")

    failing = replace(case, make=lambda seed: replace(case.make(seed), mlx=broken))
    (line,) = kernels.measure("tiny", failing, kernels.Plan([1], 1, 1.0, 64))
    assert "mlx: not there" in line.note and "on this device" not in line.note
    assert line.mlx_us is None and line.mlx_error is None and line.us > 0


def test_a_wrong_result_is_not_good():
    case = tiny_cases("affine4")["rows_qmv"]
    work = replace(case.make(0), why_not=lambda x: None)
    plan = kernels.Plan([1], 1, 1.0, 64)
    (line,) = kernels.measure("tiny", replace(case, make=lambda seed: work), plan)
    assert kernels.good(line)
    for wrong in ({"error": 0.5}, {"error": float("nan")}, {"error": None}, {"alone": False}, {"us": None}):
        assert not kernels.good(replace(line, **wrong)), wrong
    twice = replace(work, ours=lambda x: [2 * y for y in work.ours(x)])
    (line,) = kernels.measure("tiny", replace(case, make=lambda seed: twice), plan)
    assert line.error > 0.3 and line.alone and not kernels.good(line)


def test_a_kernel_that_fails_for_a_single_column_leaves_the_others_measured():
    case = tiny_cases("affine4")["rows_qmv"]
    work = case.make(0)

    def several(x: mx.array) -> list[mx.array]:
        if len(x) == 1:
            raise RuntimeError("not one")
        return work.ours(x)

    failing = replace(case, make=lambda seed: replace(work, ours=several))
    one, two = kernels.measure("tiny", failing, kernels.Plan([1, 2], 1, 1.0, 64))
    assert one.us is None and "ours: not one" in one.note and one.mlx_ratio == 1
    assert two.us > 0 and two.ratio is None and two.alone is False and not kernels.good(two)
