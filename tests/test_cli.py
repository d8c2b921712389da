"""cli: the real commands on the embedded pair, in this process where that is possible."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest

from mlx_mtp import load
from mlx_mtp.cli import main

CODE = 'def read_lines(path):\n    """Return the lines of a file."""\n'
SHORT = ["--max-tokens", "12"]


class Terminal(io.StringIO):
    """A stdin or stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def complaint(self) -> str:
        """The one line on stderr of a run that failed."""
        assert self.out == "" and self.err.count("\n") == 1 and self.err.startswith("mlx-mtp: "), self
        return self.err

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*argv: str, stdin: str | io.StringIO = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capsys.readouterr()
        code = main(list(argv))
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(autouse=True, scope="module")
def profiled():
    """The first run of all measures what drafts cost, and says so."""
    load("tiny").measure_costs()


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as in a terminal: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_generate_streams_the_text_to_stdout_and_one_line_of_statistics_to_stderr(run):
    done = run("generate", CODE, *SHORT)
    assert done.code == 0
    assert done.out.strip()
    assert done.err.count("\n") == 1
    for part in ("12 tokens", "per round", "of drafts kept", "tok/s", "prompt", "peak memory"):
        assert part in done.err


def test_profile_says_how_much_of_the_time_drafting_took(run):
    assert "drafting" not in run("generate", CODE, *SHORT).err
    done = run("generate", CODE, *SHORT, "--width", "3", "--profile")
    assert " drafting" in done.err and done.out == run("generate", CODE, *SHORT).out


def test_json_is_one_object_with_the_same_text(run):
    plain = run("generate", CODE, *SHORT)
    done = run("generate", CODE, *SHORT, "--json")
    assert done.code == 0 and done.err == ""
    answer = json.loads(done.out)
    assert answer["text"] == plain.out
    assert len(answer["tokens"]) == answer["generated_tokens"] == 12
    assert answer["finish_reason"] == "length"
    wanted = "prompt_tokens rounds drafted kept kept_per_round acceptance_by_position".split()
    wanted += "prefill_tok_s decode_tok_s host_reads peak_memory_bytes".split()
    assert set(wanted) <= set(answer)
    assert answer["drafted"] > 0


def test_the_prompt_comes_from_an_argument_a_file_or_stdin(run, tmp_path):
    (tmp_path / "prompt.py").write_text(CODE)
    texts = [
        run("generate", CODE, *SHORT),
        run("generate", "--file", str(tmp_path / "prompt.py"), *SHORT),
        run("generate", "-", *SHORT, stdin=CODE),
        run("generate", *SHORT, stdin=CODE),
    ]
    assert {(done.code, done.out) for done in texts} == {(0, texts[0].out)}


def test_the_text_is_the_same_without_a_drafter_and_at_any_width(run):
    def answer(*argv: str) -> dict:
        return json.loads(run("generate", CODE, "--json", *SHORT, *argv).out)

    plain = answer("--drafter", "none")
    assert plain["drafted"] == 0 and plain["rounds"] == 11
    for argv in (["--width", "0"], ["--width", "3"], ["--width", "heuristic"]):
        assert answer(*argv)["tokens"] == plain["tokens"]
    assert "nothing drafted" in run("generate", CODE, *SHORT, "--width", "0").err


def test_the_first_run_measures_what_drafts_cost_and_later_ones_do_not(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["generate", CODE, "--max-tokens", "40"]
    plain = run(*argv, "--width", "0")
    assert "measured once" not in plain.err + run(*argv, "--drafter", "none").err and not list(tmp_path.iterdir())
    runs = [run(*argv) for _ in range(3)]
    assert ["measured once" in one.err for one in runs] == [True, False, False]
    assert {one.out for one in runs} == {plain.out}
    assert [file.name[:6] for file in (tmp_path / ".cache" / "mlx-mtp").iterdir()] == ["costs-"]


def test_a_short_text_is_drafted_for_from_its_first_round_in_a_first_run_and_in_later_ones(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(3):
        stats = json.loads(run("generate", "--raw", "--json", "--max-tokens", "64", CODE).out)
        assert stats["tokens_per_round"] >= 2 and "0" not in stats["widths"]


def test_a_seed_makes_sampled_text_repeatable(run):
    argv = ["generate", CODE, *SHORT, "--temperature", "1.5", "--top-k", "50"]
    texts = [run(*argv, "--seed", seed).out for seed in ("7", "7", "8")]
    assert texts[0] == texts[1] != texts[2]


def test_penalties_change_the_text_and_drafting_does_not(run):
    argv = ["generate", CODE, "--max-tokens", "30", "--frequency-penalty", "1.5", "--repetition-penalty", "1.2"]
    steered = run(*argv, "--width", "3").out
    assert steered == run(*argv, "--width", "0").out != run("generate", CODE, "--max-tokens", "30").out


def test_a_message_goes_through_the_chat_template_when_asked(run):
    raw = json.loads(run("generate", "Write a function.", "--json", *SHORT).out)
    chat = json.loads(run("generate", "Write a function.", "--json", "--chat", *SHORT).out)
    assert chat["prompt_tokens"] > raw["prompt_tokens"]


def test_a_stop_string_ends_the_text_before_it(run):
    whole = run("generate", CODE, "--max-tokens", "40").out
    stop = whole[10:14]
    answer = json.loads(run("generate", CODE, "--max-tokens", "40", "--stop", stop, "--json").out)
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_on_a_terminal_the_text_ends_with_a_newline(run, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    run("generate", CODE, "--max-tokens", "3")
    assert screen.getvalue().endswith("\n") and not screen.getvalue().endswith("\n\n")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["generate", ""], "prompt is empty"),
        (["generate", "x", "--file", "y"], "given twice"),
        (["generate", "--file", "no/such/file"], "no/such/file cannot be read"),
        (["generate", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x", "--max-tokens", "-1"], "--max-tokens"),
        (["generate", "x", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "x", "--width", "-1"], "width is -1"),
        (["generate", "x", "--width", "99"], "width is 99"),
        (["generate", "x", "--width", "--4"], "width is '--4'"),
        (["generate", "x", "--width", "wide"], "width is 'wide'"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1"),
        (["generate", "x", "--temperature", "nan"], "temperature is nan"),
        (["generate", "x", "--top-p", "2"], "top_p is 2"),
        (["generate", "x", "--top-p", "0"], "top_p is 0"),
        (["generate", "x", "--top-k", "-3"], "top_k is -3"),
        (["generate", "x", "--min-p", "1.5"], "min_p is 1.5"),
        (["generate", "x", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["generate", "x", "--presence-penalty", "3"], "presence_penalty is 3"),
        (["generate", "x", "--frequency-penalty", "-3"], "frequency_penalty is -3"),
        (["generate", "x", "--seed", "-1"], "seed is -1"),
        (["generate", "x", "--stop", ""], "stop is ''"),
        (["generate", "x", "--quantize-drafter", "5"], "4 or 8"),
        (["generate", "x", "--dtype", "int8"], "int8"),
        (["generate", "x", "-m", "no-such-folder"], "no-such-folder"),
        (["generate", "x", "-m", "nobody/nothing"], "nobody/nothing"),
        (["generate", "x", "--drafter", "no-such-folder"], "no-such-folder"),
        (["generate", "x" * 100_000], "context"),
        (["chat", "-m", "no-such-folder", "--width", "99"], "width is 99"),
        (["chat", "-m", "no-such-folder", "--top-p", "2"], "top_p is 2"),
        (["chat", "-m", "no-such-folder"], "no-such-folder"),
        (["frobnicate"], "frobnicate"),
        (["generate", "x", "--frobnicate"], "--frobnicate"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_2(run, argv, complaint):
    done = run(*argv)
    assert done.code == 2, done
    assert complaint in done.complaint


def test_input_that_is_not_text_is_refused(run, tmp_path):
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    assert "not UTF-8" in run("generate", "--file", str(tmp_path / "prompt")).complaint
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    assert "not UTF-8" in run("generate", "-", stdin=stdin).complaint


def test_a_terminal_without_a_prompt_is_told_how_to_give_one(run):
    assert "give it as an argument" in run("generate", stdin=Terminal()).complaint


def test_debug_adds_where_the_error_came_from(run):
    done = run("generate", "", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err and done.err.splitlines()[-1].startswith("mlx-mtp: ")


def test_an_unforeseen_error_is_one_line_and_exit_1(run, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise ZeroDivisionError("what\nnow")

    monkeypatch.setattr(sys, "stdout", Broken())
    done = run("generate", CODE, *SHORT)
    assert done.code == 1
    assert "internal error: ZeroDivisionError: what now; run again with --debug" in done.err
    assert "Traceback" not in done.err


def test_chat_remembers_forgets_and_leaves(run):
    once = run("chat", *SHORT, stdin="Write a function.\n")
    again = run("chat", *SHORT, stdin="Write a function.\n/reset\n\nWrite a function.\n/exit\nnever read\n")
    assert once.code == again.code == 0
    assert again.out == once.out * 2
    assert again.err.count("> ") == 5 and "forgotten" in again.err
    prompts = [line.split("prompt ")[1].split(" ")[0] for line in again.err.splitlines() if "prompt " in line]
    assert len(prompts) == 2 and prompts[0] == prompts[1]
    kept = run("chat", *SHORT, stdin="Write a function.\nWrite a function.\n")
    prompts = [line.split("prompt ")[1].split(" ")[0] for line in kept.err.splitlines() if "prompt " in line]
    assert int(prompts[1]) > int(prompts[0])


def test_ctrl_c_stops_the_reply_and_not_the_conversation(run, monkeypatch):
    class Impatient(io.StringIO):
        """A terminal whose user presses Ctrl-C at the first text of the first reply."""

        pressed = False

        def write(self, text: str) -> int:
            if text and not self.pressed:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    screen = Impatient()
    monkeypatch.setattr(sys, "stdout", screen)
    done = run("chat", "--max-tokens", "60", stdin="Write a function.\nWrite a function.\n")
    assert done.code == 0
    stats = [line for line in done.err.splitlines() if "tok/s" in line]
    assert len(stats) == 1, "the stopped reply reports nothing, the next one is complete"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_generating_exits_with_130_and_says_nothing(run, monkeypatch):
    class Impatient(io.StringIO):
        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Impatient())
    done = run("generate", CODE, *SHORT)
    assert (done.code, done.err) == (130, "")


def test_pairs_lists_every_size_with_its_drafters_and_whether_they_fit(run):
    table = run("pairs")
    listed = json.loads(run("pairs", "--json").out)
    official = [p for p in listed if p["kind"] == "mtp" and p["bits"] == 16]
    assert table.code == 0 and [p["target"].split("-")[2] for p in official] == "E2B E4B 12B 26B 31B".split()
    assert all(p["drafter"] == p["target"] + "-assistant" for p in official)
    assert {p["drafter"] for p in listed if p["kind"] == "dflash"} == {
        f"z-lab/{name}-it-DFlash" for name in ("gemma4-12B", "gemma-4-26B-A4B", "gemma-4-31B")
    }
    for pair in listed:
        assert pair["target"] in table.out and pair["drafter"] in table.out and isinstance(pair["fits"], bool)
        assert pair["on_disk_bytes"] == 0


def test_what_is_in_the_hubs_cache_is_counted(tmp_path, monkeypatch):
    import huggingface_hub

    from mlx_mtp.hub import on_disk_bytes

    folder = tmp_path / "models--o--n" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "models--o--n" / "refs").mkdir()
    (tmp_path / "models--o--n" / "refs" / "main").write_text("1")
    for name, size in (("config.json", 2), ("a.safetensors", 100), ("b.safetensors", 50)):
        (folder / name).write_bytes(b"x" * size)
    find = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: find(*names, cache_dir=tmp_path))
    assert on_disk_bytes("o/n") == 150 and on_disk_bytes("o/other") == 0


def test_doctor_says_what_is_used_and_why(run):
    table = run("doctor")
    facts = json.loads(run("doctor", "--json").out)
    assert table.code == 0 and {"mlx", "device", "memory"} <= {fact["item"] for fact in facts}
    for fact in facts:
        assert fact["state"] in table.out and set(fact) == {"item", "state", "reason"}


@pytest.mark.parametrize("argv", [[], ["--help"], ["generate", "--help"], ["chat", "--help"]], ids=" ".join)
def test_help_is_on_stdout(run, argv):
    done = run(*argv)
    assert done.code == 0 and "Usage: mlx-mtp" in done.out and done.err == ""


def test_version(run):
    import mlx_mtp

    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"mlx-mtp {mlx_mtp.__version__}\n", "")


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    argv = [sys.executable, "-m", "mlx_mtp", "generate", CODE, "--max-tokens", "60"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, text=True) as child:
        os.close(writer)
        os.close(reader)
        assert child.stderr is not None
        said = child.stderr.read()
    assert (child.returncode, said) == (141, "")


def test_help_loads_neither_models_nor_networks():
    script = "import sys; from mlx_mtp.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"transformers", "torch", "mlx_lm", "huggingface_hub", "requests", "httpx"}
