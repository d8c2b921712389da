"""The noise is one function of (seed, position, token id), and good enough to sample with."""

import math
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.kernels import noise

SEED = mx.array([0x12345678, 0x9ABCDEF0], dtype=mx.uint32)
EULER_GAMMA = 0.5772156649015329


def scalar_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def scalar_gumbel(seed: tuple[int, int], position: int, token: int) -> float:
    """The definition once more, in Python integers and double precision."""
    key = scalar_mix(seed[0] ^ scalar_mix(seed[1] ^ scalar_mix(position)))
    bits = scalar_mix(scalar_mix(token ^ key) + 0x9E3779B9 * (key | 1) & 0xFFFFFFFF)
    return -math.log(-math.log1p(-((bits >> 8) + 0.5) * 2.0**-24))


def draws(seed: mx.array, positions: int, tokens: int) -> np.ndarray:
    """Noise [positions, tokens] of one seed."""
    return np.array(noise.gumbel(seed, mx.arange(positions), mx.arange(tokens)))


def uniforms(seed: mx.array, positions: int, tokens: int) -> np.ndarray:
    """The noise through its own distribution function: uniform if it is Gumbel."""
    return np.exp(-np.exp(-draws(seed, positions, tokens).astype(np.float64)))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_it_equals_the_definition_in_python_integers():
    places = [(0, 0), (1, 5), (7, 262143), (4095, 1), (2**31, 99), (2**32 - 1, 2**32 - 1)]
    for seed in [(0, 0), (1, 0), (0, 1), (0x12345678, 0x9ABCDEF0), (2**32 - 1, 2**32 - 1)]:
        for position, token in places:
            got = noise.gumbel(
                mx.array(seed, dtype=mx.uint32),
                mx.array(position, dtype=mx.uint32),
                mx.array([token], dtype=mx.uint32),
            ).item()
            assert got == pytest.approx(scalar_gumbel(seed, position, token), rel=2e-6, abs=2e-6)


def test_shapes_broadcast_and_a_value_does_not_depend_on_its_neighbours():
    seeds = mx.array([[1, 2], [3, 4], [5, 6]], dtype=mx.uint32)
    positions = mx.array([[10, 11], [20, 21], [30, 31]])
    tokens = mx.arange(17)
    whole = noise.gumbel(seeds[:, None, :], positions, tokens)
    assert whole.shape == (3, 2, 17) and whole.dtype == mx.float32
    for row in range(3):
        for column in range(2):
            alone = noise.gumbel(seeds[row], positions[row, column], tokens[4:9])
            assert mx.array_equal(whole[row, column, 4:9], alone)


def test_the_ends_of_the_range_are_finite_and_exact():
    ends = mx.array([0, 1, 2, 0x7FFFFF, 0x800000, 0xFFFFFD, 0xFFFFFE, 0xFFFFFF], dtype=mx.uint32)
    want = [-math.log1p(-(n + 0.5) * 2.0**-24) for n in ends.tolist()]
    assert np.allclose(np.array(noise.exponential(ends)), want, rtol=3e-7, atol=0)
    grown = np.array(noise.exponential(ends))
    assert np.isfinite(grown).all() and (grown > 0).all() and (np.diff(grown) > 0).all()


def test_moments_are_those_of_the_gumbel_distribution():
    g = draws(SEED, 64, 32768).astype(np.float64).ravel()
    n = g.size
    variance = math.pi**2 / 6
    assert abs(g.mean() - EULER_GAMMA) < 4 * math.sqrt(variance / n)
    # fourth central moment of a Gumbel variable: 27/5 of the squared variance
    assert abs(g.var() - variance) < 4 * variance * math.sqrt(4.4 / n)
    skewness = ((g - g.mean()) ** 3).mean() / g.std() ** 3
    assert abs(skewness - 1.1395470994) < 0.02


@pytest.mark.parametrize("seed", [(0, 0), (1, 0), (0, 1), (0x12345678, 0x9ABCDEF0)])
def test_chi_square_over_tokens_positions_and_both(seed):
    u = uniforms(mx.array(seed, dtype=mx.uint32), 256, 4096)
    bins = 64
    for sample in [u[0], u[:, 0], u[255], u[:, 4095], u.ravel()]:
        counts = np.bincount((sample * bins).astype(int).clip(0, bins - 1), minlength=bins)
        expected = sample.size / bins
        chi2 = ((counts - expected) ** 2 / expected).sum()
        # 63 degrees of freedom: mean 63, standard deviation 11.2; 4.5 of them
        assert chi2 < 63 + 4.5 * 11.3, (sample.size, chi2)


def test_the_far_tail_has_its_share():
    # large noise decides a draw among many tokens: count values above the 1 - 2^-14 quantile
    u = uniforms(SEED, 64, 262144 // 4)
    tail = (u > 1 - 2.0**-14).sum()
    expected = u.size * 2.0**-14
    assert abs(tail - expected) < 4.5 * math.sqrt(expected)


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 256])
def test_neighbouring_tokens_and_positions_are_uncorrelated(lag):
    u = uniforms(SEED, 1536, 1536)
    assert abs(correlation(u[:, :-lag], u[:, lag:])) < 4.5 / math.sqrt(u.size)
    assert abs(correlation(u[:-lag], u[lag:])) < 4.5 / math.sqrt(u.size / 2)
    assert abs(correlation(u[:-lag, lag:], u[lag:, :-lag])) < 4.5 / math.sqrt(u.size / 4)


def test_xored_tokens_and_positions_are_uncorrelated():
    # the token is xored into the key: a stream must not be another one with its tokens renumbered
    u = uniforms(SEED, 512, 2048)
    tokens, positions = np.arange(2048), np.arange(512)
    for bit in range(11):
        assert abs(correlation(u, u[:, tokens ^ (1 << bit)])) < 4.5 * math.sqrt(2 / u.size)
    for bit in range(9):
        assert abs(correlation(u, u[positions ^ (1 << bit)])) < 4.5 * math.sqrt(2 / u.size)
        assert abs(correlation(u, u[positions ^ (1 << bit)][:, tokens ^ (1 << bit)])) < 4.5 * math.sqrt(2 / u.size)


def test_neighbouring_seeds_are_uncorrelated():
    base = uniforms(SEED, 256, 4096)
    for word in range(2):
        for bit in [0, 1, 7, 16, 31]:
            other = [0x12345678, 0x9ABCDEF0]
            other[word] ^= 1 << bit
            u = uniforms(mx.array(other, dtype=mx.uint32), 256, 4096)
            assert abs(correlation(base, u)) < 4.5 / math.sqrt(u.size)


def test_pairs_of_neighbours_fill_the_square_evenly():
    u = uniforms(SEED, 1024, 2048)
    for first, second in [(u[:, :-1], u[:, 1:]), (u[:-1], u[1:])]:
        counts, _, _ = np.histogram2d(first.ravel(), second.ravel(), bins=16, range=[[0, 1], [0, 1]])
        expected = first.size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 4.5 * math.sqrt(2 * 255)


def test_the_winner_of_logits_plus_noise_is_distributed_as_the_softmax():
    logits = mx.array([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
    places = 200_000
    winners = mx.argmax(logits + noise.gumbel(SEED, mx.arange(places), mx.arange(6)), axis=-1)
    counts = np.bincount(np.array(winners), minlength=6)
    expected = np.array(mx.softmax(logits)).astype(np.float64) * places
    assert ((counts - expected) ** 2 / expected).sum() < 5 + 4.5 * math.sqrt(10)


def test_keys_of_a_seed_never_repeat_within_it():
    keys = np.array(noise.noise_key(SEED, mx.arange(1 << 19)))
    assert np.unique(keys).size == keys.size


@pytest.mark.slow  # MLX has g++ compile it
@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU by calling g++")
def test_fused_for_a_gpu_it_is_the_same_numbers_in_every_shape():
    for rows, columns, count in [(1, 1, 128), (4, 5, 192), (1, 5, 1), (3, 1, 5000)]:
        low, high = (mx.arange(rows, dtype=mx.uint32)[:, None] * factor + 3 for factor in (77777777, 123456789))
        position = (mx.arange(columns) + 1000 * mx.arange(rows)[:, None]).astype(mx.uint32)
        own = mx.random.randint(0, 262144, (rows, columns, count), key=mx.random.key(count)).astype(mx.uint32)
        for token in (mx.arange(count, dtype=mx.uint32), own[:, :1], own):
            plain = noise._gumbel(low, high, position, token)
            assert plain.shape == (rows, columns, count)
            assert mx.array_equal(noise._fused_gumbel(low, high, position, token), plain)
