"""The divergence over the dense top against the full Kullback-Leibler divergence in float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from was_search.errors import ConfigError
from was_search.masks.divergence import DenseTop, bucket_log_probs, check_top_k, concatenate, divergence, top_log_probs

V = 61


def random_logits(rows: int, spread: float, seed: int, columns: int = V) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(0, spread, (rows, columns)), dtype=torch.float32)


def over_top(p_logits: torch.Tensor, q_logits: torch.Tensor, k: int) -> np.ndarray:
    indices, dense = top_log_probs(p_logits, k)
    return divergence(dense, bucket_log_probs(q_logits, indices)[0]).double().numpy()


def full(p_logits: torch.Tensor, q_logits: torch.Tensor) -> np.ndarray:
    """KL(p || q) of each row over the whole vocabulary, float64."""
    p, q = (np.exp(log_softmax(x.double().numpy(), axis=1)) for x in (p_logits, q_logits))
    return rel_entr(p, q).sum(1)


def merged(p_logits: torch.Tensor, q_logits: torch.Tensor, k: int) -> np.ndarray:
    """The same after all but the k likeliest of p are merged into one outcome: the definition, float64."""
    p, q = (np.exp(log_softmax(x.double().numpy(), axis=1)) for x in (p_logits, q_logits))
    order = np.argsort(-p, axis=1, kind="stable")
    p, q = (np.take_along_axis(x, order, axis=1) for x in (p, q))
    p, q = (np.hstack([x[:, :k], x[:, k:].sum(1, keepdims=True)]) for x in (p, q))
    return rel_entr(p, q).sum(1)


# float32 terms of up to about 10 nats: their sum is good to a few 1e-6.
TOLERANCE = 5e-6


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("k", [1, 2, 7, 30, 60, 61])
def test_is_the_divergence_of_the_merged_distributions(spread, k):
    p, q = random_logits(40, spread, 0), random_logits(40, spread, 1)
    np.testing.assert_allclose(over_top(p, q, k), merged(p, q, k), rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_never_negative_never_above_the_full_divergence_and_rising_with_k(spread):
    """Merging outcomes loses information: the data-processing inequality, row by row."""
    p, q = random_logits(300, spread, 2), random_logits(300, spread, 3)
    bound = full(p, q)
    slack = TOLERANCE + 5e-6 * bound  # float32 logits of size 30: p itself is rounded at 2e-6
    before = np.zeros(300)
    for k in (1, 2, 5, 16, 40, 60, 61):
        found = over_top(p, q, k)
        assert np.all(found >= before - slack)
        assert np.all(found <= bound + slack)
        before = found
    assert over_top(p, q, 1).mean() < 0.99 * bound.mean()  # and it does lose some


def test_the_whole_vocabulary_gives_the_full_divergence():
    p, q = random_logits(50, 3.0, 4), random_logits(50, 3.0, 5)
    np.testing.assert_allclose(over_top(p, q, V), full(p, q), rtol=1e-6, atol=TOLERANCE)


@pytest.mark.parametrize("k", [1, 16, 61])
def test_zero_for_the_same_distribution(k):
    p = random_logits(50, 3.0, 6)
    np.testing.assert_array_equal(over_top(p, p, k), 0.0)
    # A constant added to all logits changes no probability; the logsumexp is rounded at another size.
    np.testing.assert_allclose(over_top(p, p + 20.0, k), 0.0, atol=1e-5)


def test_ties_at_the_edge_of_the_top():
    """Which of equal tokens is in the top makes the value another one, but the bounds hold for any choice."""
    p = torch.zeros(30, V)
    p[:, :3] = 2.0  # three likely ones and 58 equal ones
    q = random_logits(30, 2.0, 7)
    indices, log_probs = top_log_probs(p, 10)
    assert all(len(set(row.tolist())) == 10 and {0, 1, 2} <= set(row.tolist()) for row in indices)
    np.testing.assert_allclose(log_probs.double().exp().sum(1), 1.0, atol=1e-6)
    found = over_top(p, q, 10)
    assert np.all(found >= -TOLERANCE)
    assert np.all(found <= full(p, q) + TOLERANCE)


def test_a_rest_that_is_tiny_keeps_its_digits():
    """1 minus the sum of the top would be 0 in float32, or negative; the rest here is 4e-13 and 4e-9."""
    p, q = torch.zeros(1, V), torch.zeros(1, V)
    p[0, 0], q[0, 0] = 32.5, 23.5
    indices, dense = top_log_probs(p, 1)
    found = bucket_log_probs(q, indices)[0]
    assert float(dense[0, 1]) == pytest.approx(np.log(60) - 32.5, abs=1e-5)  # float32 of numbers about 30
    assert float(found[0, 1]) == pytest.approx(np.log(60) - 23.5, abs=1e-5)
    assert float(divergence(dense, found)) == pytest.approx(merged(p, q, 1)[0], abs=1e-7)


def test_excluded_tokens_cost_nothing_and_a_missing_one_everything():
    p, q = random_logits(1, 1.0, 8, columns=5), random_logits(1, 1.0, 9, columns=5)
    p[0, 2:] = -torch.inf
    np.testing.assert_allclose(over_top(p, q, 4), full(p, q), atol=1e-6)
    q[0, 3] = -torch.inf
    np.testing.assert_allclose(over_top(p, q, 4), full(p, q), atol=1e-6)
    q[0, int(p.argmax())] = -torch.inf
    assert over_top(p, q, 4)[0] == np.inf


@pytest.mark.parametrize("k", [4, 61])
def test_the_gradient_of_the_full_vocabulary_is_q_minus_p(k):
    """Of D by q's logits: q_i - p_i inside the top, and q_i (1 - p_rest / q_rest) outside."""
    p, q = random_logits(6, 1.5, 10), random_logits(6, 1.5, 11).requires_grad_(True)
    indices, dense = top_log_probs(p, k)
    (gradient,) = torch.autograd.grad(divergence(dense, bucket_log_probs(q, indices)[0]).sum(), q)
    p64, q64 = p.double().softmax(1), q.detach().double().softmax(1)
    inside = torch.zeros(6, V, dtype=torch.bool).scatter(1, indices, True)
    share = (p64 * ~inside).sum(1, keepdim=True) / (q64 * ~inside).sum(1, keepdim=True).clamp(min=1e-300)
    expected = torch.where(inside, q64 - p64, q64 * (1 - share))
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-5)


def top(n: int, k: int = 3, predicted: int = 5) -> DenseTop:
    rng = np.random.default_rng(n)
    return DenseTop(
        rng.integers(0, V, (n, predicted, k)).astype(np.int32), rng.normal(size=(n, predicted, k + 1)).astype("f4")
    )


def test_runs_of_sequences_and_their_rows():
    whole = top(7)
    again = concatenate([whole[:4], whole[4:]])
    np.testing.assert_array_equal(again.indices, whole.indices)
    np.testing.assert_array_equal(again.log_probs, whole.log_probs)
    assert (len(whole), len(whole[4:]), whole.k) == (7, 3, 3)
    indices, log_probs = whole[2:4].rows(torch.device("cpu"))
    assert indices.dtype == torch.int64
    np.testing.assert_array_equal(indices.view(2, 5, 3).numpy(), whole.indices[2:4])
    np.testing.assert_array_equal(log_probs.view(2, 5, 4).numpy(), whole.log_probs[2:4])


def test_arrays_that_cannot_be_written_are_taken_without_a_word():
    """Ray's shared memory is read-only."""
    found = top(2)
    found.indices.setflags(write=False)
    found.log_probs.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.rows(torch.device("cpu"))


def test_refuses_arrays_that_do_not_fit():
    found = top(2)
    with pytest.raises(
        ValueError, match=r"log_probs: must be \[n, predicted, k \+ 1\].*got \(2, 5, 3\) and \(2, 5, 3\)"
    ):
        DenseTop(found.indices, found.log_probs[..., :3])
    with pytest.raises(ValueError, match="must be int32 and float32, got int64 and float32"):
        DenseTop(found.indices.astype(np.int64), found.log_probs)


def test_no_more_tokens_than_there_are():
    check_top_k(61, 61)
    with pytest.raises(ConfigError, match="kl_top_k: must be at most the vocabulary, 61 tokens, got 62"):
        check_top_k(62, 61)
