"""The report about this machine: complete, true of the running process, and harmless."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import constants

from mlx_mtp.doctor import Fact, facts, memory_bytes, on_gpu
from mlx_mtp.load import load_target

CPU = mx.default_device().type == mx.DeviceType.cpu
EDGE = Path(__file__).parent / "fixtures" / "oracle" / "seed0" / "edge" / "target"


def found() -> dict[str, Fact]:
    return {fact.item: fact for fact in facts()}


def test_every_line_has_an_item_a_state_and_a_reason() -> None:
    rows = facts((("head", "reference", "no Metal here"),))
    assert {"system", "python", "mlx", "device", "memory", "dtype", "hub cache", "hub"} <= {f.item for f in rows}
    assert all(fact.item and fact.state and fact.reason for fact in rows)
    assert rows[-1] == Fact("kernel head", "reference", "no Metal here")


def test_the_dtype_it_names_is_the_one_that_loading_takes() -> None:
    name = str(load_target(str(EDGE)).dtype).removeprefix("mlx.core.")
    assert found()["dtype"].state == (name if CPU else "the checkpoint's own")
    assert on_gpu() is not CPU


@pytest.mark.skipif(not CPU, reason="only the CPU backend calls a compiler")
def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "used" if shutil.which("g++") else "not used"
    assert found()["mx.compile"].state == expected
    monkeypatch.setenv("PATH", "/nowhere")
    assert found()["mx.compile"].state == "not used"


def test_the_hub_is_offline_while_tests_run_and_its_cache_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--google--gemma-4-E2B-it").mkdir()
    assert found()["hub"].state == "offline"
    assert found()["hub cache"] == Fact("hub cache", str(tmp_path), found()["hub cache"].reason)
    assert found()["hub cache"].reason.startswith("1 repositories")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert found()["hub"].state == "online"


@pytest.mark.skipif(not CPU or not Path("/proc/self/maps").exists(), reason="a matter of Linux CPUs")
def test_the_blas_that_products_run_in_is_named() -> None:
    code = "from mlx_mtp.doctor import facts\nprint([f.state for f in facts() if f.item == 'BLAS'])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for library in ("", "libopenblas.so.0"):
        environment["LD_PRELOAD"] = library
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if "cannot be preloaded" in done.stderr:
            pytest.skip("no OpenBLAS on this machine")
        assert ("reference" in done.stdout) == (library == ""), done.stdout
        assert ("libopenblas" in done.stdout) == (library != ""), done.stdout


def test_memory_is_that_of_this_machine() -> None:
    assert 2**30 < memory_bytes() < 2**44
