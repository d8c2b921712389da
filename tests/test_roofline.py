"""The speed model: laws that any sensible one obeys, and its distance from what others have measured."""

from dataclasses import replace

import pytest

from mlx_mtp.chips import CHIPS, Chip, find_chip, this_chip, usable_bytes
from mlx_mtp.plan import median_errors, published
from mlx_mtp.roofline import CEILING, MLX, Roofline, Setting, tokens_per_round
from mlx_mtp.rows import RequestError
from mlx_mtp.shapes import ALL_SIZES, shape

SHAPES = {size: shape(size) for size in ALL_SIZES}
FOUR_BIT = Setting(4.5 / 8, 2.0)
SETTINGS = [replace(FOUR_BIT, batch=batch) for batch in (1, 4, 8)]


@pytest.mark.parametrize("size", ALL_SIZES)
@pytest.mark.parametrize("constants", [MLX, CEILING], ids=["mlx", "ceiling"])
def test_more_bandwidth_is_never_slower(size, constants):
    for setting in SETTINGS:
        for width in range(9):
            rounds = [
                Roofline(Chip("M4 Pro", bandwidth, 20, 64), SHAPES[size], constants).round_s(setting, width)
                for bandwidth in (100, 200, 273, 600)
            ]
            assert rounds == sorted(rounds, reverse=True)


@pytest.mark.parametrize("size", ALL_SIZES)
def test_a_round_never_gets_cheaper_with_more_columns_rows_or_context(size):
    for chip in CHIPS:
        for constants in (MLX, CEILING):
            model = Roofline(chip, SHAPES[size], constants)
            widths = [model.round_s(FOUR_BIT, width) for width in range(16)]
            batches = [model.pass_s(replace(FOUR_BIT, batch=batch), 0) for batch in range(1, 33)]
            contexts = [model.pass_s(replace(FOUR_BIT, context=n), 0) for n in (1, 512, 1024, 8192, 100000)]
            for times in (widths, batches, contexts):
                assert times == sorted(times), f"{chip.name}"


@pytest.mark.parametrize("size", ALL_SIZES)
def test_no_prediction_beats_the_ceiling(size):
    for chip in CHIPS:
        mlx, ceiling = (Roofline(chip, SHAPES[size], constants) for constants in (MLX, CEILING))
        for setting in SETTINGS:
            for width in range(9):
                assert mlx.round_s(setting, width) > ceiling.round_s(setting, width)


def test_the_best_width_is_the_fastest_of_all_and_0_is_one_of_them():
    model = Roofline(find_chip("M2 Pro"), SHAPES["26B-A4B"], MLX)
    assert model.best(FOUR_BIT, 0.3, 8).width == 0
    dense = Roofline(find_chip("M5 Max"), SHAPES["12B"], MLX)
    best = dense.best(FOUR_BIT, 0.8, 8)
    assert best.width > 0
    assert best.tok_s == max(dense.predict(FOUR_BIT, k, tokens_per_round(0.8, k)).tok_s for k in range(9))


def test_recurrent_states_are_moved_for_every_column_that_a_pass_runs():
    """Four times for each of its own and three for one that it runs again; at best once in and out a sequence."""
    chip, found = find_chip("M4 Pro"), SHAPES["Qwen3.5-27B"]
    without = replace(found, kept=tuple(replace(k, state_bytes=0) for k in found.kept))
    for constants, moves in ((MLX, (4, 7 * 4, 7 * 4 * 8)), (CEILING, (2, 2, 2 * 8))):
        for (width, batch), times in zip(((0, 1), (3, 1), (3, 8)), moves, strict=True):
            setting = replace(FOUR_BIT, batch=batch)
            more_s = Roofline(chip, found, constants).pass_s(setting, width)
            more_s -= Roofline(chip, without, constants).pass_s(setting, width)
            reach = chip.generation.reach if constants.own_kernels else 1.0
            bandwidth = chip.bandwidth_gb_s * 1e9 * reach * constants.weights
            assert more_s == pytest.approx(times * 48 * 48 * 128 * 128 * 4 / bandwidth)


def test_a_width_gives_one_token_and_what_is_kept():
    assert tokens_per_round(0.5, 0) == 1
    assert tokens_per_round(0.5, 3) == 1.875
    assert tokens_per_round(1.0, 4) == 5


def test_published_speeds_are_met_within_a_sixth_by_the_median():
    rows = published()
    assert len(rows) >= 25
    errors = median_errors(rows)
    assert {name: error for name, (error, _) in errors.items() if error > 1 / 6} == {}


def test_a_row_is_predicted_by_its_own_chip_and_size_alone():
    rows = published()
    by_setting = {}
    for row in rows:
        key = row.chip, row.size, row.setting.split(", width")[0], "110000" in row.setting, "at once" in row.setting
        by_setting.setdefault(key, set()).add(row.predicted_plain_tok_s)
    assert all(len(predictions) == 1 for predictions in by_setting.values())


@pytest.mark.parametrize("name", ["M4 Pro", "m4pro", "Apple M4 Pro", "m4-pro"])
def test_a_chip_is_found_however_it_is_written(name):
    assert find_chip(name).name == "M4 Pro"


def test_an_unknown_chip_or_machine_is_refused_in_one_line():
    with pytest.raises(RequestError, match="chip is 'M9'; expected one of M1, M1 Pro"):
        find_chip("M9")
    with pytest.raises(RequestError, match="not a Mac; name one: --chip"):
        this_chip(None)
    assert this_chip("Apple M3 Max").name == "M3 Max"


def test_usable_memory_grows_with_memory():
    found = [usable_bytes(gb) for gb in (8, 16, 24, 32, 36, 48, 64, 96, 128, 512)]
    assert found == sorted(found)
    assert all(size < gb * 2**30 for size, gb in zip(found, (8, 16, 24, 32, 36, 48, 64, 96, 128, 512), strict=True))
