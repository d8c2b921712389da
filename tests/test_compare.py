"""`compare`: turns, windows and ratios by hand, and the whole command over real processes with the embedded pair."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import read, write

from mlx_mtp.cli import main
from mlx_mtp.compare.cases import KINDS, Case, cases_of, prompts_of
from mlx_mtp.compare.driver import BASELINE, PLAIN, CompareError, Contender, Measured, Pool, Reference, Worker, turns
from mlx_mtp.compare.ours import Ours, margin
from mlx_mtp.compare.plot import plot
from mlx_mtp.compare.report import Speeds, speed_rows, table, write_csv
from mlx_mtp.compare.runs import Drafts, Run, run
from mlx_mtp.compare.worker import Load
from mlx_mtp.load import load_pair
from mlx_mtp.text import Text

TINY = Path(__file__).parent.parent / "mlx_mtp" / "data" / "tiny"
QWEN = Path(__file__).parent / "fixtures" / "qwen"
PROMPT = tuple(range(3, 23))


@pytest.fixture(scope="module")
def loaded():
    return load_pair(str(TINY / "target"), str(TINY / "drafter"), dtype=mx.float32)


@pytest.fixture(scope="module")
def text():
    return Text.from_dir(TINY / "target")


# turns and windows ------------------------------------------------------------------------------------------------


def test_two_repeats_are_a_b_b_a_and_everyone_comes_equally_often_at_every_place():
    assert [*turns(2, 0, 0), *turns(2, 1, 0)] == [0, 1, 1, 0]
    places = Counter()
    for repeat in range(10):
        places.update((place, who) for place, who in enumerate(turns(5, repeat, case=0)))
    assert set(places.values()) == {2}


def test_decoding_is_timed_from_the_first_moment_to_the_last_but_one():
    made = Run(2, 8, [(1.0, 0, [5]), (1.0, 1, [6]), (2.0, 0, [7, 8]), (3.0, 1, [9]), (3.1, 0, [4, 4])])
    assert (made.decoded, made.decode_s, made.prefill_s) == (3, 2.0, 1.0)
    assert made.tokens(0) == [5, 7, 8, 4, 4] and made.steps == 3
    assert made.tokens_per_round == (4 + 1) / (2 + 1)
    short = Run(1, 4, [(1.0, 0, [5]), (2.0, 0, [6, 7])])
    assert (short.decoded, short.decode_s) == (2, 1.0)


def test_a_run_comes_back_from_json_as_it_was():
    made = Run(1, 4, [(0.5, 0, [1, 2])], Drafts(1, [1, 1], [1, 0]), 77)
    assert Run.of(json.loads(json.dumps(made.to_json()))) == made


# prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_prompts_that_the_embedded_pair_can_read(kind, text):
    prompts = prompts_of(kind, text, raw=True)
    assert len(prompts) >= 2 and all(len(p) > 8 for p in prompts)
    asked = prompts_of(kind, text, raw=False)
    assert all(len(a) >= len(p) for a, p in zip(asked, prompts, strict=True))
    assert all(len(p) > 1500 for p in prompts) == (kind == "long")


def test_groups_have_so_many_rows_and_begin_anew_where_prompts_run_out():
    prompts = [(2, i) for i in range(5)]
    assert [len(case.prompts) for case in cases_of("code", prompts, 2, most=9)] == [2, 2]
    (eight,) = cases_of("code", prompts, 8, most=2)
    assert eight.prompts == ((2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (2, 0), (2, 1), (2, 2))


# one runtime in this process --------------------------------------------------------------------------------------


def test_a_run_has_exactly_the_tokens_asked_for_and_its_drafts(loaded):
    plain, drafted = run(Ours(loaded, 0), [PROMPT], 12), run(Ours(loaded, 3), [PROMPT], 12)
    assert plain.tokens(0) == drafted.tokens(0) and len(plain.tokens(0)) == 12
    assert plain.tokens_per_round == 1 and plain.drafts.drafted_at == []
    assert drafted.tokens_per_round == 11 / drafted.drafts.rounds and len(drafted.drafts.drafted_at) == 3
    both = run(Ours(loaded, 2), [PROMPT, PROMPT[3:]], 6)
    assert both.tokens(0) == plain.tokens(0)[:6] and both.prompt_tokens == 37


def test_a_model_of_mlx_lm_is_cast_as_its_own_converter_casts_it():
    pytest.importorskip("mlx_lm")
    from mlx_mtp.compare.mlx_lm import load

    delta = load(QWEN, mx.bfloat16).layers[0].linear_attn
    assert (delta.A_log.dtype, delta.dt_bias.dtype, delta.out_proj.weight.dtype) == (mx.float32, *[mx.bfloat16] * 2)


def test_the_margin_is_between_the_targets_two_best_logits(loaded):
    from mlx_mtp.pair import Pair

    logits = sorted(Pair(loaded, Text.from_dir(TINY / "target")).logits(PROMPT)[0, -1].tolist())
    assert margin(loaded, list(PROMPT)) == pytest.approx(logits[-1] - logits[-2], abs=1e-4)


# the report -------------------------------------------------------------------------------------------------------


class Recorded:
    """A pool whose runs were made by hand."""

    def __init__(self, texts):
        self.texts = texts

    def run(self, contender, prompts, tokens):
        return Run(1, 2, [(0.1, 0, self.texts[prompts[0]][:tokens])])

    def margin(self, tokens):
        return 0.25 * len(tokens)


def test_a_divergence_is_found_at_its_first_token_with_the_margin_there():
    reference = Reference(Recorded({(2, 3): [5, 6, 7, 8]}), 4)
    case = Case("code", ((2, 3), (2, 3)))
    made = Run(2, 4, [(1.0, 0, [5, 6, 7, 8]), (1.0, 1, [5, 9, 7, 1])])
    (found,) = reference.divergences([case], [made])
    assert (found.row, found.at, found.expected, found.got, found.margin) == (1, 1, 6, 9, 0.75)


def _measured(contender, speeds, per_step):
    """Runs of 4 steps each, of so many tokens a step; speeds in steps a second."""
    out = Measured(contender)
    runs = []
    for speed in speeds:
        arrivals = [(1.0, 0, [1])] + [(1.0 + i / speed, 0, [2] * per_step) for i in range(1, 5)]
        runs.append(Run(1, 10, arrivals, Drafts(4, [4], [3]) if contender.drafts else Drafts(), 5))
    out.texts, out.timed = [runs[0]], [[made] for made in runs]
    return out


@pytest.fixture
def made_table():
    ours = Contender("mlx-mtp width 2", "mlx-mtp", "2", True, PLAIN.name)
    measured = [_measured(ours, [8, 10], 2), _measured(PLAIN, [10, 10], 1), _measured(BASELINE, [5, 10], 1)]
    return table("code", measured, {m.contender.name: [] for m in measured}, [[10]])


def test_the_achieved_speedup_stands_beside_the_one_that_tokens_per_round_give(made_table):
    ours, plain, baseline = made_table.figures
    assert ours.over_plain is not None and (ours.over_plain.least, ours.over_plain.most) == pytest.approx((1.6, 2.0))
    assert ours.if_free == ours.tokens_per_round == 2
    assert plain.over_plain is None and baseline.over_baseline.median == 1
    assert (ours.over_baseline.least, ours.over_baseline.most) == pytest.approx((2.0, 3.2))
    assert made_table.ratios["mlx-mtp width 2 / mlx-lm plain"].most == pytest.approx(3.2)
    row = speed_rows(made_table)[0]
    assert row[6].startswith("1.80 (1.60..2.00)") and row[7] == "2.00" and row[5] == "0.75"


def test_tokens_per_round_are_those_of_the_timed_runs_and_not_of_the_warm_up():
    ours = Contender("mlx-mtp width auto", "mlx-mtp", "auto", True, PLAIN.name)
    measured = _measured(ours, [8, 10], 2)
    measured.texts = [Run(1, 10, [(1.0, 0, [1]), (2.0, 0, [2] * 8)], Drafts(8, [8], [0]), 5)]
    (figures,) = table("code", [measured], {ours.name: []}, [[10]]).figures
    assert figures.tokens_per_round == figures.if_free == 2 and figures.kept_by_position == (0.75,)


def test_speeds_of_a_repeat_are_taken_over_all_its_cases():
    one = Run(1, 10, [(1.0, 0, [1]), (2.0, 0, [2]), (3.0, 0, [3])])
    two = Run(1, 30, [(3.0, 0, [1]), (4.0, 0, [2, 2, 2]), (5.0, 0, [3])])
    assert Speeds.of([one, two]) == Speeds(decode=4 / 2, prefill=40 / 4, whole=8 / 8)


def test_files_hold_every_repeat_and_a_picture(made_table, tmp_path):
    write_csv(tmp_path / "out.csv", [made_table], {"chip": "M9"})
    header, *lines = (tmp_path / "out.csv").read_text().splitlines()
    assert header.endswith("chip") and len(lines) == 3 * 2
    assert lines[0] == "code,1,mlx-mtp width 2,0,16.00,2.0000,M9"
    pytest.importorskip("matplotlib")
    plot(tmp_path / "out.png", [made_table], "by hand")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# processes --------------------------------------------------------------------------------------------------------


def test_a_process_that_cannot_load_says_so_in_one_line(tmp_path):
    with pytest.raises(CompareError, match=r"mlx-mtp: .*no-such-folder"):
        Worker(Load("mlx-mtp", str(tmp_path / "no-such-folder"), None, None))


def test_a_process_that_dies_is_reported_with_its_last_words(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CompareError, match=r"mlx-lm: its process ended \(1\): it said nothing"):
        Worker(Load("mlx-lm", "nowhere", None, None))


def test_one_at_a_time_ends_a_process_before_the_next_begins(monkeypatch):
    running, most = set(), []

    class Counting:
        def __init__(self, what):
            self.name = what.runtime
            running.add(self.name)
            most.append(len(running))

        def ask(self, job):
            return {}

        def close(self):
            running.discard(self.name)

    monkeypatch.setattr("mlx_mtp.compare.driver.Worker", Counting)
    loads = [Load("mlx-mtp", "t", None, None), Load("mlx-lm", "t", None, None)]
    for alone, held in ((True, 1), (False, 2)):
        most.clear()
        pool = Pool(loads, alone)
        for runtime in ("mlx-mtp", "mlx-lm", "mlx-mtp"):
            pool.ask(runtime, {})
        pool.close()
        assert max(most) == held and not running


def test_the_command_compares_with_mlx_lm_token_for_token(capsys, tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm")
    monkeypatch.setattr("mlx_mtp.cli.compare.find_spec", lambda name: None if name == "mlx_vlm" else name)
    csv = tmp_path / "out.csv"
    options = ["--kind", "code", "--batch", "2", "--width", "2", "-n", "6", "--repeats", "1"]
    assert main(["compare", *options, "--groups", "1", "--no-preload", "--json", "--csv", str(csv)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [(t["kind"], t["rows"]) for t in found["tables"]] == [("code", 2)]
    for t in found["tables"]:
        assert [f["name"] for f in t["figures"]] == ["mlx-mtp width 2", "mlx-mtp width 0", "mlx-lm plain"]
        assert all(f["differs"] == [] and f["stable"] and f["peak_bytes"] > 0 for f in t["figures"])
        assert t["figures"][0]["tokens_per_round"] > 1
    assert "mlx-vlm is not installed" in err and found["machine"]["mlx-lm"]
    assert len(csv.read_text().splitlines()) == 1 + 3


def compare_qwen(folder: Path, capsys, *options: str) -> tuple[dict, str]:
    """What the command finds with a Qwen 3.5 checkpoint, and what it says on stderr."""
    asked = ["--kind", "chat", "--batch", "1", "--width", "3", "-n", "6", "--repeats", "1", "--groups", "1", *options]
    assert main(["compare", "-m", str(folder), *asked, "--no-preload", "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_head_in_a_targets_own_files_drafts_beside_mlx_lm(capsys, monkeypatch):
    pytest.importorskip("mlx_lm")
    monkeypatch.setattr("mlx_mtp.cli.compare.find_spec", lambda name: None if name == "mlx_vlm" else name)
    (found,) = compare_qwen(QWEN, capsys)[0]["tables"]
    assert [f["name"] for f in found["figures"]] == ["mlx-mtp width 3", "mlx-mtp width 0", "mlx-lm plain"]
    assert all(f["differs"] == [] and f["stable"] for f in found["figures"])
    assert len(found["figures"][0]["kept_by_position"]) == 3


@pytest.mark.slow
def test_a_runtime_that_cannot_load_a_checkpoint_is_left_out_in_one_line(capsys, monkeypatch, tmp_path):
    """Nothing here is called mlx_vlm, so that its process fails whether it is installed or not."""
    pytest.importorskip("mlx_lm")
    (tmp_path / "mlx_vlm.py").write_text("raise ValueError('missing:\\n  this\\n' + 'and that, ' * 99)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    monkeypatch.setattr("mlx_mtp.cli.compare.find_spec", lambda name: name)
    found, err = compare_qwen(QWEN, capsys)
    assert [f["name"] for f in found["tables"][0]["figures"]][-1] == "mlx-lm plain"
    (line,) = [line for line in err.splitlines() if "left out" in line]
    assert "mlx-vlm: ValueError: missing: this and that" in line and len(line) < 300


def test_a_copy_without_the_head_is_refused_before_a_process_is_started(capsys, tmp_path):
    whole = read(QWEN)
    without = {name: value for name, value in whole.tensors.items() if not name.startswith("mtp.")}
    folder = write(replace(whole, tensors=without), tmp_path / "headless")
    assert main(["compare", "-m", str(folder), "--no-preload"]) == 2
    out, err = capsys.readouterr()
    machine, refusal = err.splitlines()
    assert out == "" and "chip" in machine
    assert "its files hold none" in refusal and "name a copy that has it with --drafter" in refusal


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "poetry"], "kind is 'poetry'; expected code, chat"),
        (["--batch", "9"], "batch is 9; expected 1 to 8"),
        (["--block", "1"], "block is 1; expected 2 to 16"),
        (["--width", "99"], "width is 99"),
        (["--drafter", "none"], "a comparison needs one"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, words, capsys):
    assert main(["compare", *arguments, "--no-preload"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err


@pytest.mark.parametrize(
    ("missing", "option", "words"),
    [
        ("mlx_lm", [], "pip install 'mlx-mtp[compare]'"),
        ("matplotlib", ["--plot", "out.png"], "pip install 'mlx-mtp[plot]'"),
    ],
)
def test_a_missing_extra_is_named_with_its_installation(missing, option, words, capsys, monkeypatch):
    for place in ("cli.compare", "compare.plot"):
        monkeypatch.setattr(f"mlx_mtp.{place}.find_spec", lambda name: None if name == missing else name)
    assert main(["compare", *option, "--no-preload"]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
