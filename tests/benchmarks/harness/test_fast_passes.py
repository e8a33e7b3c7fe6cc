from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness.fast_passes import FastPasses
from was_search.masks.calibration import histogram_pass
from was_search.masks.masked_model import MaskedModel

THRESHOLDS = np.random.default_rng(1).uniform(0.0, 1.0, (3, 7)).astype(np.float32)


def reference(model, data, thresholds):
    found, seen, dropped = histogram_pass(MaskedModel.of(model, "l2"), data, thresholds)
    return found.counts, dropped / seen


def check(model, other, data) -> None:
    """float32 scores in other batches may fall into the next bin: a few of 26,250 or more a projection."""
    passes = FastPasses(MaskedModel.of(model, "l2"), data)
    for thresholds in (None, THRESHOLDS, THRESHOLDS * 2):
        counts, achieved = reference(other, data, thresholds)
        histograms, found = passes(thresholds)
        assert np.abs(histograms.counts - counts).sum(axis=-1).max() <= 20
        np.testing.assert_array_equal(histograms.counts.sum(axis=-1), counts.sum(axis=-1))
        np.testing.assert_allclose(found, achieved, atol=2e-4)


def test_passes_are_those_of_the_reference(make_llama, token_set):
    check(make_llama(), make_llama(), token_set)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_passes_on_a_gpu(make_llama, token_set):
    check(make_llama().cuda(), make_llama().cuda(), token_set)
