"""The counter-based generator: published answers, golden bits, moments, and independence of cutting."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, norm

from honeloom.ops import noise, noise_kernels
from honeloom.ops.rounding import round_once

ONES = 0xFFFFFFFF
STREAMS = [noise.uniform, noise.normal, noise.gaussian, noise.rademacher]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_answers(counter, key, answer):
    words = noise.philox([torch.tensor([c]) for c in counter], key)
    assert tuple(int(w) for w in words) == answer


def bits(values) -> list[str]:
    return [float(v).hex() for v in values]


def test_golden_bits():
    """These may never change: adapters, plans and zeroth-order updates are replayed from them."""
    assert bits(noise.uniform(0, "golden", 3)) == [
        "0x1.3de751e4fcce4p-2", "0x1.5656140809150p-5", "0x1.f2a456d27f3f0p-3",
    ]  # fmt: skip
    assert bits(noise.uniform(7, "golden", 2, start=10**10)) == ["0x1.ec88cb34b11e6p-1", "0x1.758c5d7b5cce8p-1"]
    assert bits(noise.normal(0, "golden", 4, dtype=torch.float64)) == [
        "-0x1.c92872d051c21p-4", "0x1.d48da7620b343p+0", "-0x1.938b77e77002fp-6", "0x1.e96f8eab5f988p+0",
    ]  # fmt: skip
    assert bits(noise.gaussian(0, "golden", 5)) == [
        "-0x1.ebe80a0000000p-3",
        "-0x1.4843ee0000000p-3",
        "0x1.aee8400000000p-1",
        "-0x1.31ff3e0000000p+1",
        "-0x1.fed44c0000000p-3",
    ]
    assert bits(noise.gaussian(7, "golden", 2, start=10**10 + 1)) == ["-0x1.c58ebe0000000p-1", "-0x1.e3ec600000000p-3"]
    digest = hashlib.sha256(noise.gaussian(3, "golden", 100_000).numpy().tobytes()).hexdigest()
    assert digest.startswith("2fe3b1bb93163eae")
    assert noise.rademacher(0, "golden", 12).tolist() == [1, 1, 1, 1, 1, -1, -1, 1, -1, -1, -1, -1]
    drawn = noise.bernoulli(0, "golden", 0.3, 12)
    assert drawn.dtype == torch.bool
    assert drawn.int().tolist() == [0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0]
    assert noise.permutation(0, "golden", 8).tolist() == [6, 0, 2, 7, 4, 1, 5, 3]
    assert bits(noise.keyed_uniform(0, "golden", ["a", "b"])) == ["0x1.b8b2ee47a4b62p-2", "0x1.f7aa680444ac9p-1"]
    digest = hashlib.sha256(noise.normal(3, "golden", 100_000).numpy().tobytes()).hexdigest()
    assert digest.startswith("2439aa347e59324b")


def test_normal_is_the_quantile_of_its_words():
    words = noise._words("normal", 5, "x", 0, 200_000, "cpu").numpy()
    got = noise.normal(5, "x", 200_000, dtype=torch.float64).numpy()
    np.testing.assert_allclose(got, norm.ppf((words + 0.5) / 2**32), rtol=0, atol=1e-12)


def test_normal_at_the_ends_and_at_the_seam():
    words = torch.tensor([0, 1, 2, ONES, 1 << 31, int(0.075 * 2**32), int(0.925 * 2**32), int(0.9251 * 2**32)])
    wanted = [statistics.NormalDist().inv_cdf((w + 0.5) / 2**32) for w in words.tolist()]
    np.testing.assert_allclose(noise._quantile(words).numpy(), wanted, rtol=1e-14)
    assert torch.equal(noise._quantile(words), -noise._quantile(ONES - words))


def test_own_logarithm():
    x = torch.logspace(-300, 300, 10_001, dtype=torch.float64)
    np.testing.assert_allclose(noise._log(x).numpy(), np.log(x.numpy()), rtol=4e-16, atol=1e-15)


def test_moments_and_distribution():
    n = 1 << 18
    z = noise.normal(11, "moments", n, dtype=torch.float64).numpy()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((z[1:] * z[:-1]).mean()) < 4 / n**0.5
    assert kstest(z[:50_000], "norm").pvalue > 1e-3
    assert kstest(noise.uniform(11, "moments", 50_000).numpy(), "uniform").pvalue > 1e-3
    assert abs(float(noise.rademacher(11, "moments", n).mean())) < 4 / n**0.5
    share = float(noise.bernoulli(11, "moments", 0.2, n).double().mean())
    assert abs(share - 0.2) < 4 * (0.16 / n) ** 0.5


def test_float32_normal_is_what_box_and_muller_say():
    words = noise._words("gaussian", 5, "x", 0, 200_000, "cpu").numpy().reshape(-1, 2)
    u = ((words[:, 0] >> 1 | 1) / 2**31).astype(np.float64)
    quadrant = ((words[:, 1] & (2**30 - 1) ^ 2**29) - 2**29 + 0.5) * (np.pi / 2 / 2**30) + np.pi / 4
    sign = 1 - 2 * np.stack([words[:, 1] >> 31, words[:, 1] >> 30 & 1], 1)
    wanted = np.sqrt(-2 * np.log(u))[:, None] * np.stack([np.cos(quadrant), np.sin(quadrant)], 1) * sign
    got = noise.gaussian(5, "x", 200_000).numpy().reshape(-1, 2)
    assert np.abs(got - wanted).max() < 3e-6


def test_the_largest_and_the_smallest_float32_normal():
    radius = noise._root_of_log(torch.tensor([0, 1, 2, 3, ONES - 1, ONES, 1 << 31]))
    wanted = [(31 * np.log(2)) ** 0.5] * 2 + [((31 * np.log(2)) - np.log(w)) ** 0.5 for w in (1, 1)]
    np.testing.assert_allclose(radius[:4].numpy(), wanted, rtol=2e-7)
    assert radius[4:6].tolist() == [0.0, 0.0] and float(radius[6]) == pytest.approx(np.log(2) ** 0.5, rel=1e-7)
    less, more = noise._turned(torch.arange(0, 1 << 32, 1 << 22))
    np.testing.assert_allclose((less.double() ** 2 + more.double() ** 2).numpy(), 2, rtol=4e-7)


def test_float32_normal_moments_distribution_tails_and_independence():
    n = 1 << 22
    z = noise.gaussian(11, "moments", n).numpy().astype(np.float64)
    for power, moment, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        assert abs((z**power).mean() - moment) < 4 * ((square - moment**2) / n) ** 0.5
    assert kstest(z, "norm").pvalue > 1e-3
    for radius in (3.0, 4.0, 4.5):
        for share in ((z > radius).mean(), (z < -radius).mean()):
            expected = norm.sf(radius)
            assert abs(share - expected) < 4 * (expected / n) ** 0.5
    assert np.abs(z).max() < 6.6
    for lag in (1, 2, 3, 4, 8, 128, 4096):
        for f in (lambda x: x, lambda x: x**2 - 1, np.sign):
            one, other = f(z[:-lag]), f(z[lag:])
            assert abs((one * other).mean()) < 4.5 * (one.var() * other.var() / n) ** 0.5
    cells = np.histogram2d(norm.cdf(z[::2]), norm.cdf(z[1::2]), bins=32, range=[[0, 1], [0, 1]])[0]
    assert chisquare(cells.ravel()).pvalue > 1e-3
    angles = np.arctan2(z[1::2], z[::2])
    assert kstest(angles / (2 * np.pi) + 0.5, "uniform").pvalue > 1e-3
    assert kstest(z[::2] ** 2 + z[1::2] ** 2, "chi2", args=(2,)).pvalue > 1e-3


SIZES = (*range(1, 71), 127, 128, 129, 4095, 4096, 4097, 8191, 100_001)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 127, 129, 5000, 2**34 + 7])
def test_kernels_have_the_bits_of_torch(kind, start):
    stream, key = getattr(noise, kind), noise.stream_key(kind, 5, "x")
    for size in SIZES:
        drawn = np.full(size, np.nan, np.float32)
        noise_kernels.fill(kind == "rademacher", drawn, start, *key)
        assert np.array_equal(drawn.view(np.int32), stream(5, "x", size, start=start).numpy().view(np.int32))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("amount", [1e-3, -0.37, 1e-20])
def test_kernels_add_as_torch_does(kind, amount):
    key, amount = noise.stream_key(kind, 5, "x"), float(np.float32(amount))
    for size in SIZES:
        theta = torch.randn(size, generator=torch.Generator().manual_seed(size))
        z = getattr(noise, kind)(5, "x", size)
        wanted, fused, plain = theta + z * amount, theta.clone(), theta.clone()
        where = [np.array([t.data_ptr()]) for t in (fused, plain)]
        noise_kernels.add(kind == "rademacher", where[0], np.array([size]), np.array([key]), amount)
        noise_kernels.add_drawn(where[1], np.array([size]), z.numpy(), amount)
        assert torch.equal(fused, wanted) and torch.equal(plain, wanted)


def test_kernels_take_many_tensors_at_once():
    tensors = [torch.randn(n) for n in (3, 1, 4100)]
    before, keys = [t.clone() for t in tensors], [noise.stream_key("gaussian", 1, str(k)) for k in range(3)]
    where, sizes = (np.array([f(t) for t in tensors]) for f in (torch.Tensor.data_ptr, torch.Tensor.numel))
    kept = np.empty(4104, np.float32)
    noise_kernels.copy(where, sizes, kept, False)
    assert np.array_equal(kept, torch.cat(tensors).numpy())
    noise_kernels.add(False, where, sizes, np.array(keys), 0.5)
    assert all(
        torch.equal(t, b + 0.5 * noise.gaussian(1, str(k), len(b)))
        for k, (t, b) in enumerate(zip(tensors, before, strict=True))
    )
    noise_kernels.copy(where, sizes, kept, True)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_all_kernels_compile_in_seconds(tmp_path):
    """In a fresh process with an empty cache."""
    code = """
import time, numpy as np
from honeloom.ops import noise_kernels as k
x, begun = np.zeros(9, np.float32), time.process_time()
where, sizes, keys = np.array([x.ctypes.data]), np.array([9]), np.array([[1, 2]])
k.fill(False, x, 0, 1, 2), k.add(True, where, sizes, keys, 0.5), k.add_drawn(where, sizes, x.copy(), 0.5)
k.copy(where, sizes, x.copy(), False)
k.accumulate(False, x, np.array([[1, 2]]), np.array([0.5]))
print(time.process_time() - begun)
"""
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 10 and any(tmp_path.rglob("*.nbi"))


def test_other_names_seeds_and_kinds_are_other_streams():
    one = noise.uniform(0, "a", 1000)
    for other in (noise.uniform(0, "b", 1000), noise.uniform(1, "a", 1000)):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.13
    keyed = noise.keyed_uniform(0, "a", [str(i) for i in range(1000)])
    assert abs(np.corrcoef(one.numpy(), keyed)[0, 1]) < 0.13


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(STREAMS),
    st.integers(0, 2**34),
    st.lists(st.integers(0, 70), min_size=1, max_size=6),
)
def test_cutting_changes_nothing(stream, start, sizes):
    whole = stream(2, "cut", sum(sizes), start=start)
    pieces, position = [], start
    for size in sizes:
        pieces.append(stream(2, "cut", size, start=position))
        position += size
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("stream", STREAMS)
def test_block_size_and_threads_change_nothing(stream, monkeypatch):
    whole = stream(2, "block", 10_000, start=3)
    monkeypatch.setattr(noise, "_BLOCK", 97)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(stream(2, "block", 10_000, start=3), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_normal_is_rounded_once(dtype):
    wide = noise.normal(0, "r", 1000, dtype=torch.float64)
    assert torch.equal(noise.normal(0, "r", 1000, dtype=dtype), round_once(wide, dtype))


@given(st.lists(st.text(), unique=True, max_size=20), st.randoms())
@settings(max_examples=30, deadline=None)
def test_keyed_numbers_depend_on_the_id_alone(ids, random):
    values = dict(zip(ids, noise.keyed_uniform(4, "k", ids), strict=True))
    shuffled = ids[:]
    random.shuffle(shuffled)
    assert dict(zip(shuffled, noise.keyed_uniform(4, "k", shuffled), strict=True)) == values
    assert all(0 <= v < 1 for v in values.values())


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_permutation_is_one(n):
    assert sorted(noise.permutation(0, "p", n).tolist()) == list(range(n))


def test_nonsense_is_refused():
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            noise.uniform(seed, "x", 1)
    with pytest.raises(ValueError, match="negative"):
        noise.uniform(0, "x", -1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stream", STREAMS)
def test_devices_agree_to_the_bit(stream):
    assert torch.equal(stream(1, "gpu", 1 << 20, start=5, device="cuda").cpu(), stream(1, "gpu", 1 << 20, start=5))
