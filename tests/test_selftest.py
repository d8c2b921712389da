"""`selftest`: a line a check, one file with nothing private in it, and a wrong output is found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_mtp import selftest
from mlx_mtp.cli import main
from mlx_mtp.compare.driver import Divergence
from mlx_mtp.compare.report import Figures, Spread, Table
from mlx_mtp.pair import Pair
from mlx_mtp.selftest import Check, Parting, _judged, checked, exactness, judged_tables, without_private

USER, HOST = "margarethe", "margarethes-laptop"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the command as a user with a name, on a host with one; returns exit code, stdout, stderr and the report."""
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setattr("socket.gethostname", lambda: f"{HOST}.local")
    monkeypatch.setattr("platform.node", lambda: HOST)
    monkeypatch.setattr("sys.executable", str(home / "venv" / "bin" / "python"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "models"))
    monkeypatch.setattr("mlx_mtp.cli.selftest.TOKENS", 6)

    def call(*argv: str):
        file = home / "report.json"
        code = main(["selftest", "--output", str(file), "--no-compare", *argv])
        return code, *capsys.readouterr(), json.loads(file.read_text())

    return call


def test_a_good_machine_passes_and_the_report_says_what_was_tried(run):
    code, out, err, report = run()
    assert code == 0 and report["passed"] is True
    assert "PASS exactness: all 80 outputs" in out and out.splitlines()[-1].startswith("PASS; ")
    assert [check["result"] for check in report["checks"] if check["name"] == "exactness"] == ["pass"]
    assert report["machine"]["mlx"] and all(line.startswith("mlx-mtp: ") for line in err.splitlines())
    assert "PASS memory: " in out and "fits at 4 bits: E2B" in out
    items = {fact["item"] for check in report["checks"] if check["name"] == "environment" for fact in check["data"]}
    assert {"mlx", "device", "memory", "dtype"} <= items


def test_nothing_private_is_in_the_report_even_where_an_error_names_it(run, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError(f"no {Path.home()}/x for {USER} on {HOST}.local")

    monkeypatch.setattr(selftest, "load", fails)
    code, out, _, report = run()
    text = json.dumps(report)
    assert code == 1 and report["passed"] is False
    assert "RuntimeError: no ~/x for <user> on <host>" in text
    assert not [word for word in (USER, HOST, str(Path.home())) if word in text]
    assert "FAIL exactness: RuntimeError: no ~/x" in out and out.splitlines()[-1].startswith("FAIL: exactness")


def test_a_private_word_is_replaced_alone_and_not_within_others():
    private = {"/srv/al": "~", "al": "<user>", "mac.local": "<host>", "mac": "<host>", "": "nothing"}
    given = {"al": ["al and metal, /srv/al/x; mac.local", 3, None], "b": ("al-2",)}
    assert without_private(given, private) == {"al": ["<user> and metal, ~/x; <host>", 3, None], "b": ["<user>-2"]}


def test_an_output_that_depends_on_drafts_fails_unless_two_tokens_nearly_tied(monkeypatch):
    generate = Pair.generate

    def wrong(self, prompts, sampling, width, max_tokens):
        out = generate(self, prompts, sampling, width=width, max_tokens=max_tokens)
        if width == 3 and not sampling.greedy:
            out[-1].tokens[4] += 1
        return out

    monkeypatch.setattr(Pair, "generate", wrong)
    found = exactness(6)
    assert found.result == "fail" and "2 of 80 outputs" in found.detail and "seeded, draft length 3" in found.detail
    parting = Parting("seeded", 3, 1, 4, selftest.near_tie())
    assert _judged(80, [parting]).result == "pass"
    assert _judged(80, [parting, replace(parting, margin=2 * parting.margin)]).result == "fail"


def test_a_margin_is_that_of_the_choice_noise_included():
    pair = selftest.load("tiny")
    prompt = pair.text.encode("def read_lines(path):\n")
    for sampling in selftest.SAMPLED.values():
        (output,) = pair.generate([prompt], sampling, width=0, max_tokens=6)
        for at, token in enumerate(output.tokens):
            scores = selftest._scores(pair, [*prompt, *output.tokens[:at]], sampling)
            assert int(scores.argmax()) == token


def test_a_failing_check_says_why_and_takes_its_time():
    def fails() -> Check:
        raise ValueError("first line\nsecond line")

    found = checked("memory", fails)
    assert (found.name, found.result, found.detail) == ("memory", "fail", "ValueError: first line second line")


def test_a_comparison_passes_unless_ours_parts_from_its_target_where_that_was_sure():
    def table(*margins: float) -> Table:
        one = Spread(2.0, 1.5, 2.5)
        parted = tuple(Divergence(0, 0, 3, 1, 2, margin) for margin in margins)
        ours = Figures("mlx-mtp width auto", one, one, one, one, (), 3.0, (), one, 3.0, one, 0, parted, True)
        return Table("code", 1, ((4,),), (ours,), {}, {})

    assert judged_tables([table(), table(1e-6)]).result == "pass"
    assert "2.00 (1.50..2.50) at 1" in judged_tables([table()]).detail
    assert judged_tables([table(), table(3.0)]).result == "fail"


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(capsys, tmp_path):
    assert main(["selftest", "-o", str(tmp_path / "no" / "such" / "file")]) == 2
    assert capsys.readouterr().err.startswith("mlx-mtp: ")
