from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness.random_models import plan_at
from tests.doubles.tiny_models import masked_logits, tiny_model
from was_search.checkpoints.structure import find_structure
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking


@pytest.mark.parametrize("masks", ["separate", "shared"])
def test_a_plan_of_one_sparsity_is_exact_on_what_it_was_made_with(masks, monkeypatch):
    model = tiny_model("llama", dtype=torch.float32)
    tokens = torch.randint(0, 97, (1, 100), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: tokens)
    plan = plan_at(model, 0.6, masks)
    assert plan.shape.masks == masks
    structure = find_structure(model, masks)
    norms = [[torch.tensor(norm) for norm in row] for row in plan.norms]
    with torch.inference_mode(), Masking(MaskedModel(model, structure, norms), plan.thresholds, count=True) as masking:
        model(tokens, use_cache=False)
    # One channel of a projection's 99 x 48 lies at the threshold.
    np.testing.assert_allclose(masking.achieved(), 0.6, atol=2e-3)
    assert torch.isfinite(masked_logits(model, plan, tokens)).all()
