"""The memory budget: laws it obeys on every Mac, and what `load` and the server make of it."""

import itertools
import json
import struct
from pathlib import Path

import checkpoints as ck
import pytest
from checkpoints import FIXTURES
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from servers import EDGE, running

from mlx_mtp import GREEDY, load
from mlx_mtp.chips import find_chip, usable_bytes
from mlx_mtp.cli import main
from mlx_mtp.memory_budget import MAX_NUM_SEQS, Budget, PairSize, Room, budget, check
from mlx_mtp.models.config import PassSize
from mlx_mtp.models.gemma4 import Gemma4
from mlx_mtp.models.gemma4_assistant import Assistant
from mlx_mtp.plan import Machine, Wish, memory_of, read_pair
from mlx_mtp.rows import RequestError
from mlx_mtp.scheduler import Limits
from mlx_mtp.shapes import ALL_SIZES, read_configs, shape

MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192)
SHAPES = {size: shape(size) for size in ALL_SIZES}
TARGET, DRAFTER = (str(FIXTURES / "edge" / name) for name in ("target", "assistant"))


def on_mac(memory_gb: float, size: str, bits: int, drafter_bits: int = 16) -> Budget:
    machine = Machine(find_chip("M3 Ultra"), memory_gb)
    return memory_of(machine, Wish(size, bits, drafter_bits, 1, 1), SHAPES[size]).default


# every Mac --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize("memory_gb", MACS)
def test_what_fits_on_a_mac_holds_a_useful_context_for_every_sequence(memory_gb, size):
    for bits in (4, 8, 16):
        for drafter_bits in (4, 16):
            b = on_mac(memory_gb, size, bits, drafter_bits)
            if b.fits:
                assert 1 <= b.num_seqs <= MAX_NUM_SEQS
                assert 8192 <= b.fair_share_len <= b.max_seq_len
                assert b.num_seqs * SHAPES[size].seq_bytes(b.fair_share_len) <= b.kv_bytes
                taken = b.target_bytes + b.drafter_bytes + b.working_bytes + b.kv_bytes
                assert taken <= b.usable_bytes == usable_bytes(memory_gb)
                assert b.default_max_tokens(100) >= 4096


# Memory, size, bits: pairs that had room for a few tokens, or replies of one, although they "fitted".
@pytest.mark.parametrize(
    ("memory_gb", "size", "bits", "num_seqs"),
    [(48, "31B", 8, 2), (24, "26B-A4B", 4, 3), (32, "31B", 4, 2), (36, "31B", 4, 4), (16, "12B", 4, 5)],
)
def test_pairs_that_had_hardly_any_room_run_with_useful_contexts(memory_gb, size, bits, num_seqs):
    b = on_mac(memory_gb, size, bits)
    assert b.fits and b.num_seqs >= num_seqs and b.fair_share_len >= 8192


def test_a_packed_drafter_leaves_room_for_more_sequences():
    plain, packed = on_mac(24, "26B-A4B", 4, 16), on_mac(24, "26B-A4B", 4, 4)
    assert packed.num_seqs > plain.num_seqs


def test_a_pair_that_is_too_large_is_refused_with_figures_and_what_helps():
    found = SHAPES["31B"].pair_size(17_267_000_000, 939_000_000, 675_000_000)
    b = budget(found, Room(usable_bytes(24)))
    with pytest.raises(RequestError) as caught:
        check(found, b, "gemma-4-31B-it-4bit")
    said = str(caught.value)
    assert "\n" not in said and said.startswith("gemma-4-31B-it-4bit: weights take 18.21 GB (drafter 0.94)")
    assert "17.18 GB are usable" in said and "8,192 tokens of one sequence 1.56" in said
    assert "--quantize-drafter 4 (saves 0.68 GB, not enough alone)" in said and "a smaller model" in said


def test_where_packing_the_drafter_is_enough_that_is_the_advice():
    found = SHAPES["26B-A4B"].pair_size(14_194_000_000, 839_000_000, 603_000_000)
    least = 14_194_000_000 + 839_000_000 + found.working_bytes(512, 1) + found.seq_bytes(8192)
    b = budget(found, Room(least - 300_000_000))
    with pytest.raises(RequestError, match="--quantize-drafter 4 saves 0.60 GB, which is enough"):
        check(found, b, "x")


# any machine ------------------------------------------------------------------------------------------------


def pair_of(weights: int, fixed: int, token: int, context: int) -> PairSize:
    size = PassSize(token_numbers=1000, heads=8, window=64)
    return PairSize(weights, 0, lambda n: fixed + token * n, size, 64, 1024, context)


@given(
    weights=st.integers(0, 2**33),
    fixed=st.integers(0, 2**30),
    token=st.integers(1, 2**17),
    context=st.integers(1, 2**18),
    usable=st.integers(2**28, 2**36),
    seqs=st.integers(1, 16),
)
def test_more_memory_never_means_less(weights, fixed, token, context, usable, seqs):
    pair = pair_of(weights, fixed, token, context)
    less, more = (budget(pair, Room(n, seqs, 512)) for n in (usable, usable + 2**28))
    assert 1 <= less.num_seqs <= more.num_seqs <= seqs
    assert less.fits <= more.fits
    if less.fits:
        assert less.num_seqs * pair.seq_bytes(less.fair_share_len) <= less.kv_bytes
        assert less.fair_share_len >= pair.useful_context
        prompt = min(100, less.max_seq_len - 1)
        assert 1 <= less.default_max_tokens(prompt) <= less.max_seq_len - prompt or less.max_seq_len <= prompt


def test_prompt_chunks_are_halved_before_they_crowd_out_the_cache():
    pair = SHAPES["26B-A4B"].pair_size(14_194_000_000, 839_000_000)
    chunks = [budget(pair, Room(usable_bytes(gb))).chunk for gb in (24, 32, 64)]
    assert chunks == sorted(chunks) and chunks[0] < chunks[-1] == 2048
    assert budget(pair, Room(usable_bytes(24), chunk=128, least_chunk=128)).chunk == 128


def test_the_scores_of_a_full_layer_stay_within_their_bytes():
    pair = SHAPES["31B"].pair_size(0, 0)
    for start in (0, 10_000, 100_000):
        chunk = pair.score_chunk(start)
        assert 1 <= chunk and 2 * 32 * chunk * (start + chunk) * 2 <= 256 * 2**20
        assert 2 * 32 * (chunk + 1) * (start + chunk + 1) * 2 > 256 * 2**20


# loading ----------------------------------------------------------------------------------------------------


def with_usable(monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    """Pretend that the tiny pair and its passes leave so many bytes."""
    pair = load(TARGET, DRAFTER, dtype="float32")
    b = pair.budget
    taken = b.target_bytes + b.drafter_bytes + b.working_bytes
    monkeypatch.setattr("mlx_mtp.pair.memory_bytes", lambda: taken + spare)


def test_a_pair_that_does_not_fit_is_refused_before_a_weight_is_read(monkeypatch):
    with_usable(monkeypatch, 1000)
    stages = []
    with pytest.raises(RequestError, match="GB are usable; "):
        load(TARGET, DRAFTER, dtype="float32", report=lambda *step: stages.append(step))
    assert stages == []


def test_fewer_sequences_run_where_memory_is_short_and_the_user_is_told(monkeypatch):
    size = load(TARGET, DRAFTER, dtype="float32")._loaded.size
    with_usable(monkeypatch, 3 * size.seq_bytes(size.useful_context) + 1000)
    pair = load(TARGET, DRAFTER, dtype="float32")
    assert pair.budget.num_seqs == 3 == pair._engine.scheduler.limits.max_rows
    assert any(w.startswith("3 of 8 sequences run at once") for w in pair.warnings)
    texts = pair.generate([[2, 7 + i] for i in range(5)], GREEDY, 2, 4)
    assert all(len(t.tokens) for t in texts)


def test_requests_without_a_limit_run_at_once_and_not_one_after_another(monkeypatch):
    size = load(TARGET, DRAFTER, dtype="float32")._loaded.size
    with_usable(monkeypatch, 4 * size.seq_bytes(size.useful_context) + 1000)
    pair = load(TARGET, DRAFTER, dtype="float32")
    streams = [pair.stream([2, 7 + i], GREEDY, 2) for i in range(4)]
    for stream in streams:
        next(stream)
    assert pair.occupancy()[0] == 4
    for stream in streams:
        stream.close()


def test_a_limit_that_holds_no_token_is_refused_and_one_that_holds_few_is_warned_of():
    row = load(TARGET, DRAFTER, dtype="float32")._loaded.size.seq_bytes(1)
    with pytest.raises(RequestError, match="the limit for keys and values is"):
        load(TARGET, DRAFTER, dtype="float32", limits=Limits(kv_bytes=row - 1))
    pair = load(TARGET, DRAFTER, dtype="float32", limits=Limits(kv_bytes=row))
    assert pair.budget.num_seqs == 1 and "tokens of one sequence; 4,096 tokens are useful" in pair.warnings[-1]
    with pytest.raises(RequestError, match="lower the limit for keys and values"):
        load(TARGET, DRAFTER, dtype="float32", limits=Limits(kv_bytes=2**60))


def test_a_server_with_little_memory_gives_whole_replies():
    """An eighth of this memory holds no token at all, and that was a reply's limit."""
    row = load(*EDGE, dtype="float32").budget.window_bytes
    with running(kv_bytes=7 * row) as live:
        body = {"prompt": "import os", "temperature": 0, "ignore_eos": True, "stream": True}
        with live.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = itertools.islice((line for line in answer.iter_lines() if line), 30)
            assert not [line for line in lines if "length" in line or "[DONE]" in line]


# plan -m ----------------------------------------------------------------------------------------------------


def mixed_copy(folder: Path) -> Path:
    """As a published "4bit" copy whose feed-forward layers are at 8 bits."""
    packed = ck.quantised(ck.mlx_community(ck.read(FIXTURES / "dense" / "target")), ck.Quant(4, 32), MIXED)
    return ck.write(packed, folder, shards=2)


MIXED = {"*.mlp.*_proj": ck.Quant(8, 32)}


def test_a_plan_reads_what_a_copy_weighs_from_its_headers_and_the_loader_agrees(tmp_path, capsys):
    folder = mixed_copy(tmp_path / "gemma-4-12B-it-4bit")
    found = read_pair(str(folder))
    loaded = load(str(folder), None, dtype="bfloat16")
    assert found.size.target_bytes == loaded.budget.target_bytes
    assert found.stored_bytes["8 bit"] > 0 and found.stored_bytes["4 bit"] > 0
    assert sum(found.stored_bytes.values()) == found.size.target_bytes
    machine = ["plan", "--chip", "M4", "--memory", "16"]
    assert main([*machine, "-m", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert f"8 bit {found.stored_bytes['8 bit'] / 1e9:.2f} GB" in err and "at once" in out
    assert main([*machine, "-m", str(folder), "--json", "--batch", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stored_bytes"] == found.stored_bytes
    assert told["memory"][0]["memory_bytes"]["target"] == found.size.target_bytes


def test_a_plan_counts_the_drafter_that_the_loader_finds(tmp_path):
    folder = mixed_copy(tmp_path / "t")
    assert read_pair(str(folder)).size.drafter_bytes == 0
    ck.write(ck.read(FIXTURES / "dense" / "assistant"), folder / "assistant")
    plain, packed = (read_pair(str(folder), bits) for bits in (16, 4))
    assert plain.size.drafter_bytes > packed.size.drafter_bytes > 0
    assert plain.drafter == packed.drafter == str(folder / "assistant")


def test_a_plan_of_what_is_not_here_says_so_in_one_line_offline(capsys):
    assert main(["plan", "--chip", "M4", "--memory", "16", "-m", "mlx-community/gemma-4-12B-it-4bit"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "HF_HUB_OFFLINE is set" in err


def test_a_plan_of_a_published_shape_says_how_fast_it_should_be(tmp_path, capsys):
    """A 12B copy whose headers are written and whose weights are not: files with holes."""
    folder = hollow_copy(tmp_path / "gemma-4-12B-it-4bit", "12B")
    hollow_copy(tmp_path / "gemma-4-12B-it-assistant", "12B", drafter=True)
    found = read_pair(str(folder))
    assert found.shape is not None and found.shape.size == "12B"
    assert found.size.target_bytes == pytest.approx(23.81e9, rel=0.001)
    assert found.setting(4, 100).target_bytes == pytest.approx(2, rel=0.001)
    assert main(["plan", "--chip", "M4 Max", "--memory", "64", "-m", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "plain tok/s" in out and "total" in out


def test_a_copy_of_a_published_size_that_does_not_fit_is_refused_without_reading_it(tmp_path, monkeypatch):
    folder = hollow_copy(tmp_path / "gemma-4-12B-it", "12B")
    monkeypatch.setattr("mlx_mtp.pair.memory_bytes", lambda: usable_bytes(32))
    with pytest.raises(RequestError, match="use a copy in fewer bits or a smaller model"):
        load(str(folder), None, dtype="bfloat16")


def hollow_copy(folder: Path, size: str, drafter: bool = False) -> Path:
    """A published size in bfloat16, whose file is as long as its header says and takes no space on the disk."""
    config = read_configs(size)["drafter" if drafter else "target"]
    model = Assistant(SHAPES[size].drafter) if drafter else Gemma4(SHAPES[size].target)
    header, end = {}, 0
    for name, value in tree_flatten(model.parameters()):
        integer = name.endswith("token_ordering")
        begin, end = end, end + value.size * (8 if integer else 2)
        stored = name if drafter else f"model.language_model.{name}"
        header[stored] = {"dtype": "I64" if integer else "BF16", "shape": value.shape, "data_offsets": [begin, end]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return folder
