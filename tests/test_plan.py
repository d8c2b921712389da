"""Plans for ten chips of three generations: what fits, what it takes, and answers an owner would find sensible."""

import json

import pytest

from mlx_mtp.chips import find_chip
from mlx_mtp.cli import main
from mlx_mtp.plan import ACCEPTANCE, Machine, Wish, check_wish, memory_of, setting_of, speed
from mlx_mtp.rows import RequestError
from mlx_mtp.shapes import ALL_SIZES, SIZES, shape

SHAPES = {size: shape(size) for size in ALL_SIZES}

# Chip, memory, the largest pair of E2B < E4B < 12B < 26B-A4B < 31B that runs at 4 bit with a bf16 drafter.
MACS = [
    ("M1", 8, "E4B"),
    ("M1 Pro", 16, "12B"),
    ("M1 Max", 64, "31B"),
    ("M1 Ultra", 128, "31B"),
    ("M3", 16, "12B"),
    ("M3 Pro", 36, "31B"),
    ("M3 Ultra", 96, "31B"),
    ("M4", 24, "26B-A4B"),
    ("M4 Pro", 24, "26B-A4B"),
    ("M4 Max", 128, "31B"),
]


@pytest.mark.parametrize(("chip", "memory_gb", "largest"), MACS)
def test_the_largest_pair_that_fits_is_the_one_people_run(chip, memory_gb, largest):
    machine = Machine(find_chip(chip), memory_gb)
    running = [size for size in SIZES if memory_of(machine, Wish(size, 4, 16, 1, 2048), SHAPES[size]).fits]
    assert running == list(SIZES[: SIZES.index(largest) + 1])


@pytest.mark.parametrize(("chip", "memory_gb", "largest"), MACS)
def test_speeds_are_of_a_sensible_order(chip, memory_gb, largest):
    found = find_chip(chip)
    for size in ALL_SIZES:
        wish = Wish(size, 4, 16, 1, 2048)
        predicted = speed(found, setting_of(wish), SHAPES[size], ACCEPTANCE["code"])
        weights_s = SHAPES[size].target_counts.dense * 4.5 / 8 / (found.bandwidth_gb_s * 1e9)
        assert 1 <= predicted.plain.tok_s <= 1 / weights_s
        assert predicted.plain.tok_s <= predicted.best.tok_s <= predicted.ceiling.tok_s
        assert predicted.best.speedup <= predicted.best.width + 1


def test_faster_chips_of_a_generation_are_faster():
    for names in (("M1", "M1 Pro", "M1 Max", "M1 Ultra"), ("M4", "M4 Pro", "M4 Max"), ("M5", "M5 Pro", "M5 Max")):
        for size in SIZES:
            wish = Wish(size, 4, 16, 1, 2048)
            plain = [speed(find_chip(name), setting_of(wish), SHAPES[size], 0.8).plain.tok_s for name in names]
            assert plain == sorted(plain)


@pytest.mark.parametrize("size", ALL_SIZES)
def test_what_fits_still_fits_with_more_memory_fewer_bits_or_fewer_rows(size):
    chip = find_chip("M3 Ultra")
    for wish in [Wish(size, bits, 16, batch, 2048) for bits in (4, 16) for batch in (1, 8)]:
        machines = [Machine(chip, gb) for gb in (8, 16, 24, 36, 64, 96, 192, 512)]
        by_memory = [memory_of(machine, wish, SHAPES[size]).fits for machine in machines]
        assert by_memory == sorted(by_memory) and by_memory[-1]
    large = Machine(chip, 512)
    by_bits = [memory_of(large, Wish(size, bits, 16, 1, 2048), SHAPES[size]).total for bits in (4, 8, 16)]
    by_batch = [memory_of(large, Wish(size, 4, 16, batch, 2048), SHAPES[size]).total for batch in (1, 2, 8, 64)]
    assert by_bits == sorted(by_bits) and by_batch == sorted(by_batch)


def test_total_memory_is_the_sum_of_its_parts():
    machine = Machine(find_chip("M3 Ultra"), 96)
    one, eight = (memory_of(machine, Wish("31B", 4, 4, batch, 8192), SHAPES["31B"]) for batch in (1, 8))
    assert one.target == pytest.approx(17.27e9, rel=0.001)
    assert one.drafter == pytest.approx(0.264e9, rel=0.001)
    assert one.seq == SHAPES["31B"].seq_bytes(8192)
    assert one.per_1k_tokens == 81_920_000
    assert (eight.target, eight.drafter, eight.seq) == (one.target, one.drafter, one.seq)
    assert one.total == one.target + one.drafter + one.seq + one.working
    assert eight.working >= one.working
    assert eight.total == eight.target + eight.drafter + 8 * eight.seq + eight.working


def test_nonsense_is_refused():
    for wish, words in (
        (Wish("31B", 5, 16, 1, 2048), "bits is 5; expected 16, 8, 4"),
        (Wish("31B", 4, 2, 1, 2048), "drafter bits is 2; expected 16, 8, 4"),
        (Wish("31B", 4, 16, 0, 2048), "batch is 0; expected 1 to 64"),
        (Wish("31B", 4, 16, 1, 10**6), "context is 1000000; 31B takes 1 to 262144 tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            check_wish(wish, SHAPES["31B"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "not a Mac"),
        (["--memory", "24"], "--memory is given without --chip"),
        (["--chip", "M4 Pro"], "without --memory"),
        (["--chip", "M4 Pro", "--memory", "512"], "an M4 Pro has 8 to 64 GB"),
        (["--chip", "Ryzen", "--memory", "64"], "chip is 'Ryzen'"),
        (["--chip", "M4 Pro", "--memory", "24", "--size", "70B"], "size is '70B'"),
    ],
)
def test_the_command_refuses_nonsense_in_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("mlx_mtp.mlx_setup.chip_brand", lambda: None)
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_the_command_prints_tables_and_the_same_as_json(capsys):
    machine = ["plan", "--chip", "M4 Pro", "--memory", "24", "--size", "26B-A4B", "--bits", "4", "--batch", "1"]
    assert main([*machine, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (pair,) = found["pairs"]
    assert pair["fits"] and found["machine"]["chip"] == "M4 Pro"
    assert main(machine) == 0
    out = capsys.readouterr().out
    assert f"{pair['memory_bytes']['target'] / 1e9:.2f}" in out
    best = pair["speed"]["code"]["best_width"]
    assert f"{pair['speed']['code']['by_width'][best]['tok_s']:.0f}" in out


def test_the_command_shows_predictions_beside_what_was_published(capsys):
    assert main(["plan", "--published", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["plan", "--published"]) == 0
    out = capsys.readouterr().out
    assert f"median error, speed-up: {found['errors']['speed-up']['median_error']:.0%}" in out
    assert all(row["source"] in out for row in found["rows"])
