"""What a person meets in the first hour on a Mac, on a pretended one: every command runs, and no kernel ends a run."""

import io
import os
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import metal_emu as emu
import mlx.core as mx
import pytest
from macs import GB, M4, MACS, Mac, pretended
from metal_emu import checks
from servers import EDGE, running, until

from mlx_mtp import mlx_setup
from mlx_mtp.cli import main
from mlx_mtp.mlx_setup import Setup
from mlx_mtp.pair import Pair, load
from mlx_mtp.rows import GREEDY, Sampling

emulated = pytest.mark.skipif(emu.unavailable() is not None, reason=str(emu.unavailable()))
PROMPT = tuple(range(3, 30))  # 27 tokens
PLAIN = Setup(kernels="off")
SEEDED = Sampling(temperature=0.9, seed=5)
VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_SDPA_D512_MIN_KL")


@pytest.fixture(autouse=True)
def new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of other tests, and nothing that is set stays."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def run(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(argv))
    return code, out.getvalue(), err.getvalue()


def texts_of(pair: Pair) -> list[list[int]]:
    """What a pair makes of two prompts, one greedy and one seeded, with drafts."""
    wanted = ((PROMPT, GREEDY), ((5, 6, 7), SEEDED))
    return [pair.generate([prompt], sampling, 2, 5)[0].tokens for prompt, sampling in wanted]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """The same without a Mac."""
    return texts_of(load("tiny", dtype="float32"))


# every Mac --------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("mac", MACS, ids=lambda mac: f"{mac.brand}, {mac.memory_gb} GB, macOS {mac.macos}")
def test_doctor_and_plan_answer_on_every_mac(mac: Mac):
    with pretended(mac):
        code, out, _ = run("doctor")
        planned, _, complaint = run("plan")
    assert code == 0 and f"macOS {mac.macos}" in out and "Metal GPU" in out
    assert "kernel rows_qmv" in out and "not tried yet" in out
    early = mac.brand.startswith(tuple(f"Apple M{n}" for n in (1, 2, 3, 4)))
    assert ("MLX_MAX_OPS_PER_BUFFER" in out) == early and "MLX_SDPA_D512_MIN_KL" in out
    assert ("not limited" in out) == mac.macos.startswith("14")
    listed = mac.brand not in ("Apple M6", "Apple processor")
    assert planned == (0 if listed else 2)
    assert listed or len(complaint.splitlines()) == 1


@emulated
def test_mlx_is_set_up_at_load_and_put_back_at_the_end():
    with pretended(M4) as mac:
        pair = load("tiny", drafter=None, setup=PLAIN)
        assert mac.wired == [M4.working_set] and M4.working_set == int(48 * GB * 0.75)
        assert [os.environ[name] for name in VARIABLES] == ["1000", "400", "0"]
        pair.generate([PROMPT], GREEDY, 0, 2)
        assert mac.cleared >= 1, "nothing runs any more"
        pair.close()
        assert mac.wired[1:] == [0]
        pair.close()
        assert len(mac.wired) == 2


@emulated
def test_what_the_user_has_set_stays_and_no_tuning_sets_nothing(monkeypatch: pytest.MonkeyPatch):
    with pretended(M4) as mac:
        pair = load("tiny", drafter=None, setup=Setup("off", tuning=False))
        pair.generate([PROMPT], GREEDY, 0, 2)
        assert not mac.wired and not mac.cleared and not any(name in os.environ for name in VARIABLES)
        monkeypatch.setenv(VARIABLES[0], "77")
        mlx_setup.prepare()
        assert [os.environ[name] for name in VARIABLES] == ["77", "400", "0"]
        assert "set by you" in run("doctor")[1]


@pytest.mark.parametrize(
    "brand, early", [("Apple M1", 1), ("Apple M4 Max", 1), ("Apple M5", 0), ("Apple M12", 0), (None, 0)]
)
def test_limits_of_command_buffers_are_raised_on_the_chips_that_gain(brand, early):
    assert ("MLX_MAX_OPS_PER_BUFFER" in mlx_setup.variables(brand)) == bool(early)


@emulated
def test_nothing_is_wired_before_macos_15():
    with pretended(MACS[0]) as mac:
        load("tiny", drafter=None, setup=PLAIN)
        assert not mac.wired


# kernels ----------------------------------------------------------------------------------------------------


@emulated
def test_the_text_is_that_of_the_plain_path_and_rounds_build_nothing(plain: list[list[int]]):
    with pretended() as mac:
        assert texts_of(load("tiny", dtype="float32", setup=PLAIN)) == plain and not mac.launches
        pair = load("tiny", dtype="float32")
        built, loading = mac.libraries, len(mac.launches)
        assert len(built) <= 15
        assert texts_of(pair) == plain
        assert len(mac.launches) > loading and mac.libraries == built
    assert pair.kernels and pair.kernels.count("1.00") == 6 and "not used" not in pair.kernels


@emulated
def test_a_prompt_runs_on_mlx_s_own_operations():
    with pretended() as mac:
        pair = load("tiny", dtype="float32")
        before = len(mac.launches)
        pair.generate([PROMPT], GREEDY, 3, 1)  # the first token, and no round
        names = Counter(launch.definition.name for launch in mac.launches[before:])
    assert names == {"rows_qmv": 1}, "one row, for its logits"


def refuse(definition: emu.Definition, template: dict) -> bool:
    return definition.name == "rows_qmv" and template["M"] == 8


@emulated
def test_a_variant_that_metal_refuses_is_found_at_load_and_the_text_is_whole(
    plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """Of the kernel's variants the one for one row is taken: what rounds would ask for later decides."""
    real = emu.Kernel._run

    def refusing(kernel: emu.Kernel, call: emu.Call) -> list[mx.array]:
        if refuse(kernel.definition, dict(call.template)):
            raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: it is too large")
        return real(kernel, call)

    monkeypatch.setattr(emu.Kernel, "_run", refusing)
    with pretended() as mac:
        pair = load("tiny", dtype="float32")
        before = len(mac.launches)
        assert texts_of(pair) == plain
        names = {launch.definition.name for launch in mac.launches[before:]}
        code, out, err = run("generate", "--kernels", "rows_qmv", "--max-tokens", "2", "--width", "0", "def f(x):")
    assert "rows_qmv" not in names and "gate_up" in names
    assert code == 0 and out and "not used, rows_qmv" in err and "Unable to build metal library" in err
    assert "too large" not in err, "one line"


@emulated
def test_a_kernel_that_fails_later_does_not_end_the_run(
    plain: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real, broken = emu.Kernel._run, []

    def failing(kernel: emu.Kernel, call: emu.Call) -> list[mx.array]:
        if broken and kernel.definition.name == "rows_qmv":
            broken.append(kernel)
            raise RuntimeError("[metal::Device] Unable to build metal library from source")
        return real(kernel, call)

    monkeypatch.setattr(emu.Kernel, "_run", failing)
    with pretended():
        pair = load("tiny", dtype="float32")
        broken.append(None)
        assert texts_of(pair) == plain
    assert len(broken) == 2, "no kernel is asked again"
    assert "running on without kernels" in caplog.text
    assert pair.kernels and "a pass failed" in pair.kernels


@emulated
def test_a_kernel_that_gives_nan_is_not_used(plain: list[list[int]]):
    edit = checks.planted("attend_join", "source", "sum / weight", "NAN")
    with pretended(edit=edit) as mac:
        pair = load("tiny", dtype="float32")
        before = len(mac.launches)
        assert texts_of(pair) == plain
        names = {launch.definition.name for launch in mac.launches[before:]}
    assert "rows_qmv" in names and "attend_parts" not in names
    assert pair.kernels and "differs from the reference by nan" in pair.kernels


@emulated
def test_kernels_that_are_slow_here_are_not_used_and_doctor_says_by_how_much(plain: list[list[int]]):
    with pretended(launch_s=1.0) as mac:
        pair = load("tiny", dtype="float32")
        before = len(mac.launches)
        assert texts_of(pair) == plain
        assert len(mac.launches) == before
        _, out, _ = run("doctor", "--json")
    assert pair.kernels and pair.kernels.count("times as long as MLX's own") == 6
    assert out.count("times as long as MLX's own") == 6


@emulated
def test_a_wrong_name_of_a_kernel_is_a_mistake_before_anything_is_read():
    with pretended():
        code, _, err = run("generate", "--kernels", "fast", "text")
    assert code == 2 and len(err.splitlines()) == 1
    assert "kernels is 'fast'; expected auto, off, or some of rows_qmv, gate_up" in err


# prompts ----------------------------------------------------------------------------------------------------


@emulated
def test_prompts_come_in_chunks_that_suit_a_gpu():
    with pretended():
        limits = load("tiny", drafter=None, setup=PLAIN)._limits
    assert (limits.alone_tok, limits.chunk_tok, limits.first_chunk_tok) == (2048, 2048, 256)
    assert limits.score_chunk, "the CPU of this pretended Mac has no fused attention"
    here = load("tiny", drafter=None)._limits
    assert (here.alone_tok, here.chunk_tok, here.first_chunk_tok, here.score_chunk) == (128, 512, 64, None)


# the server -------------------------------------------------------------------------------------------------


@emulated
def test_the_server_answers_and_sets_mlx_back_when_it_ends():
    with running(EDGE) as live:
        plain = live.text([5, 9, 2, 7], max_tokens=4, temperature=0)
    with pretended() as mac:
        with running(EDGE) as live:
            assert live.text([5, 9, 2, 7], max_tokens=4, temperature=0) == plain
            assert mac.wired == [M4.working_set] and mac.launches
            until(lambda: mac.cleared)
        assert mac.wired == [M4.working_set, 0]
