from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness.fast_passes import FastPasses
from was_kernels.pass_ops import ops_for
from was_search.masks.calibration import histogram_pass
from was_search.masks.masked_model import MaskedModel

THRESHOLDS = np.random.default_rng(1).uniform(0.0, 1.0, (3, 7)).astype(np.float32)


def check(model, other, data, moved: int) -> None:
    """float32 scores in other batches may fall into the next bin: ``moved`` of 26,250 or more a projection."""
    ops = ops_for(next(model.parameters()).device)
    passes = FastPasses(MaskedModel.of(model, "l2", ops=ops), data)
    for thresholds in (None, THRESHOLDS, THRESHOLDS * 2):
        found, seen, dropped = histogram_pass(MaskedModel.of(other, "l2", ops=ops), data, thresholds)
        histograms, achieved = passes(thresholds)
        assert np.abs(histograms.counts - found.counts).sum(axis=-1).max() <= 2 * moved
        np.testing.assert_array_equal(histograms.counts.sum(axis=-1), found.counts.sum(axis=-1))
        np.testing.assert_allclose(achieved, dropped / seen, atol=2e-4 * moved / 10)


def test_passes_are_those_of_the_reference(make_llama, token_set):
    check(make_llama(), make_llama(), token_set, moved=10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_passes_on_a_gpu(make_llama, token_set):
    """Its products differ by more from batch to batch: seen were 33 scores that moved."""
    check(make_llama().cuda(), make_llama().cuda(), token_set, moved=50)
