from __future__ import annotations

import pickle
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from was_search.errors import InfeasibleError, StorageError
from was_search.masks.histogram import (
    N_BINS,
    DeviceHistograms,
    Histograms,
    PackedCounts,
    bin_counts,
    bin_edges,
    no_counts,
)

BIN_WIDTH = 2.0**-7
"""Relative width of a bin: bfloat16 keeps 7 bits of the mantissa."""

finite_scores = arrays(np.float32, st.integers(1, 60), elements=st.floats(0, 2.0**100, width=32))


def of(scores: np.ndarray) -> Histograms:
    """A histogram of one block whose seven projections have the same scores."""
    return Histograms(np.tile(bin_counts(torch.tensor(scores, dtype=torch.float32)).numpy(), (1, 7, 1)))


def threshold(scores: np.ndarray, sparsity: float) -> float:
    return float(of(scores).thresholds(np.full((1, 7), sparsity))[0, 0])


@given(finite_scores)
def test_every_score_lies_in_its_bin(scores):
    edges = bin_edges()
    counts = bin_counts(torch.tensor(scores)).numpy()
    expected, _ = np.histogram(scores.astype(np.float64), np.append(edges[:0x7F80], np.inf))
    np.testing.assert_array_equal(counts[:0x7F80], expected)
    assert counts.sum() == len(scores)
    assert counts.shape == (N_BINS,)


def test_edges_are_the_bfloat16_numbers():
    edges = bin_edges()
    assert len(edges) == N_BINS + 1
    patterns = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).double().numpy()
    np.testing.assert_array_equal(edges[:0x7F80], patterns)
    assert np.all(np.isinf(edges[0x7F80:]))
    normal = edges[0x80:0x7F80]
    assert np.max(np.diff(normal) / normal[:-1]) == BIN_WIDTH


@settings(deadline=None, max_examples=60)  # 7 x 32,768 sums an example
@given(finite_scores, st.floats(0.001, 0.999))
def test_a_threshold_lies_in_the_bin_of_the_exact_quantile(scores, sparsity):
    found = threshold(scores, sparsity)
    exact = float(np.quantile(scores, sparsity, method="inverted_cdf"))
    edges = bin_edges()
    i = int(np.searchsorted(edges, exact, side="right")) - 1
    # The threshold is rounded to float32, to the upper edge at most.
    assert edges[i] <= found <= edges[i + 1]


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.6, 0.95, 0.999])
def test_thresholds_of_many_scores_against_numpy(sparsity):
    scores = np.abs(np.random.default_rng(0).standard_normal(200_001)).astype(np.float32)
    found = threshold(scores, sparsity)
    exact = float(np.quantile(scores.astype(np.float64), sparsity))
    assert abs(found - exact) <= BIN_WIDTH * exact
    # Inside a bin the density hardly changes: interpolation is far better than the bin, under 1e-4.
    assert np.mean(scores < found) == pytest.approx(sparsity, abs=3e-4)


def test_sparsity_zero_drops_nothing():
    assert threshold(np.array([0.0, 0.0, 1.0], np.float32), 0.0) == 0.0


def test_ties_share_a_bin():
    found = threshold(np.full(100, 3.0, np.float32), 0.5)
    assert 3.0 < found < 3.0 * (1 + BIN_WIDTH)  # linear inside the bin [3, 3 + 2^-6): all of them are dropped


def test_zeros_are_dropped_first():
    scores = np.concatenate([np.zeros(70), np.full(30, 5.0)]).astype(np.float32)
    assert 0.0 < threshold(scores, 0.5) < 1e-38  # inside the bin of zero: above every zero, under everything else
    assert threshold(scores, 0.71) > 5.0


@given(finite_scores, st.floats(0, 0.998), st.floats(0, 0.998))
@settings(deadline=None, max_examples=30)
def test_thresholds_rise_with_sparsity(scores, a, b):
    histogram = of(scores)
    low, high = (float(histogram.thresholds(np.full((1, 7), s))[0, 0]) for s in sorted((a, b)))
    assert low <= high


def test_shards_add_up_in_any_order():
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    whole = of(scores.numpy())
    parts = [of(part.numpy()) for part in scores.split(301)]
    total = parts[3] + parts[0] + parts[2] + parts[1]
    np.testing.assert_array_equal(whole.counts, total.counts)


def test_each_projection_has_its_own_threshold():
    counts = torch.stack([bin_counts(torch.full((4,), 2.0**p)) for p in range(14)]).numpy().reshape(2, 7, N_BINS)
    found = Histograms(counts).thresholds(np.full((2, 7), 0.5)).ravel()
    expected = np.array([2.0**p * (1 + BIN_WIDTH / 2) for p in range(14)])  # the middle of the bin
    np.testing.assert_allclose(found, expected, rtol=1e-7)  # float32


def test_scores_that_are_not_finite_are_counted_above_all_others():
    negative_nan = torch.tensor(float("inf")) * torch.tensor(0.0)  # carries a sign bit on x86
    scores = torch.stack([torch.tensor(1.0), torch.tensor(float("inf")), negative_nan, torch.tensor(float("nan"))])
    counts = bin_counts(scores)
    assert counts.sum() == 4
    assert counts[0x7F80:].sum() == 3


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3.4e38])
def test_refuses_a_quantile_among_scores_that_are_not_finite(bad):
    histogram = of(np.array([1.0, bad, bad], np.float32))
    assert histogram.thresholds(np.full((1, 7), 0.3))[0, 0] < 1.01
    with pytest.raises(InfeasibleError, match=r"scores of block 0, projection 0 are not finite at sparsity 0\.5"):
        histogram.thresholds(np.full((1, 7), 0.5))


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_refuses_sparsities_outside_their_range(bad):
    sparsities = np.full((1, 7), 0.5)
    sparsities[0, 3] = bad
    with pytest.raises(InfeasibleError, match=r"sparsities: must be in \[0, 1\), got"):
        of(np.ones(3)).thresholds(sparsities)


@pytest.mark.parametrize("seed", range(3))
def test_counts_on_a_device_give_the_same_thresholds(seed):
    rng = np.random.default_rng(seed)
    counts = np.zeros((3, 7, N_BINS), np.int64)
    counts[..., 15_000:16_500] = rng.integers(0, 9, (3, 7, 1500)) * rng.integers(0, 2, (3, 7, 1500))
    counts[1, 2, 0x7F7F:] = 1
    here, there = Histograms(counts), DeviceHistograms(torch.from_numpy(counts))
    np.testing.assert_array_equal(there.host().counts, counts)
    for sparsities in (np.zeros((3, 7)), np.full((3, 7), 0.5), rng.uniform(0.0, 0.99, (3, 7))):
        np.testing.assert_array_equal(there.thresholds(sparsities), here.thresholds(sparsities))


def test_counts_on_a_device_refuse_what_those_on_the_host_do():
    counts = np.zeros((1, 7, N_BINS), np.int64)
    counts[0, :6, 100] = 1
    counts[0, 5, -1] = 9
    for point in (np.full((1, 7), 0.5), np.full((1, 7), 1.0), np.full((2, 7), 0.5), np.eye(7)[[5]] * 0.5):
        messages = set()
        for histograms in (Histograms(counts), DeviceHistograms(torch.from_numpy(counts))):
            with pytest.raises(InfeasibleError) as caught:
                histograms.thresholds(point)
            messages.add(str(caught.value))
        assert len(messages) == 1


def test_refuses_another_shape_and_an_empty_histogram():
    with pytest.raises(InfeasibleError, match=r"sparsities: shape must be \(1, 7\), got \(2, 7\)"):
        of(np.ones(3)).thresholds(np.full((2, 7), 0.5))
    with pytest.raises(InfeasibleError, match="histogram of block 0, projection 0 is empty"):
        Histograms(np.zeros((1, 7, N_BINS), np.int64)).thresholds(np.full((1, 7), 0.5))


def test_refuses_counts_of_another_shape():
    with pytest.raises(StorageError, match=r"counts: shape must be \[L, 7, 32768\], got \(7, 32768\)"):
        Histograms(np.zeros((7, N_BINS), np.int64))


def test_bytes_round_trip():
    histogram = of(np.arange(100, dtype=np.float32))
    again = Histograms.from_bytes(histogram.to_bytes(), 1)
    np.testing.assert_array_equal(histogram.counts, again.counts)
    assert again.counts.dtype == np.int64
    assert again.n_blocks == 1


def test_pickles_hold_the_counts_alone():
    histogram = of(np.arange(100, dtype=np.float32))
    before = len(pickle.dumps(histogram))
    expected = histogram.thresholds(np.full((1, 7), 0.5))  # forms the sums
    payload = pickle.dumps(histogram)
    assert len(payload) == before
    np.testing.assert_array_equal(pickle.loads(payload).thresholds(np.full((1, 7), 0.5)), expected)


def test_refuses_damaged_bytes():
    payload = of(np.ones(3)).to_bytes()
    with pytest.raises(StorageError, match=r"cached histograms are damaged: .* calibrate again"):
        Histograms.from_bytes(b"x" + payload, 1)
    size = 7 * N_BINS * 8
    for wrong, n_blocks in [
        (payload[:-10], 1),
        (payload, 2),
        (zlib.compress(b"\0" * (size + 8)), 1),
        (b"", 1),
    ]:
        with pytest.raises(StorageError, match=rf"{n_blocks * size} bytes expected for {n_blocks} blocks, got \d+"):
            Histograms.from_bytes(wrong, n_blocks)


def test_packed_counts_add_up_whatever_comes_first():
    drawn = np.random.default_rng(0)
    counts = torch.from_numpy(drawn.integers(0, 3, (4, 2, 7, N_BINS)) * (drawn.random((4, 2, 7, N_BINS)) < 0.01))
    counts[0, 1, 6, -1] = 1 << 40  # more than an int32 holds
    packed = [PackedCounts.of(each) for each in counts]
    assert packed[1].counts.dtype == packed[1].places.dtype == np.int32
    assert len(packed[1].places) == int((counts[1] != 0).sum())
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        total = no_counts(2)
        for number in order:
            packed[number].add_to(total)
        assert torch.equal(total, counts.sum(0))
    assert torch.equal(PackedCounts.of(no_counts(2)).add_to(no_counts(2)), no_counts(2))
