"""Times of generate: one for each step, dense and plans by turns, the model given back."""

from __future__ import annotations

import pytest
import torch

from tests.doubles.tiny_models import model_of, tiny_plan, tokens_of
from was_kernels.runtime.sparse_linear import SparseLinear
from was_kernels.timing import generate as timing
from was_kernels.timing.generate import TokenTimes, beside_each_other, token_times


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_each_step_after_the_first_has_a_time(cache):
    model = model_of("llama", "cpu", torch.float32)
    model.generation_config.eos_token_id = 5  # ends no text that is timed
    steps = []
    hook = model.model.register_forward_pre_hook(lambda *_: steps.append(1))
    found = token_times(model, tokens_of(1, 9), 12, **cache)
    hook.remove()
    assert len(steps) == 12 and len(found) == 10
    assert all(seconds > 0.0 for seconds in found)


def test_plans_and_dense_take_turns(monkeypatch):
    model = model_of("llama", "cpu", torch.float32)
    plan = tiny_plan(model)
    seen = []

    def times(model, prompt, new_tokens, **options):
        seen.append(any(isinstance(module, SparseLinear) for module in model.modules()))
        return [float(len(seen)), 10.0, 20.0]

    monkeypatch.setattr(timing, "token_times", times)
    dense, sparse = beside_each_other([(model, None), (model, plan)], tokens_of(1, 9), new_tokens=4, rounds=2)
    assert seen == [False, True, False, True]
    assert (dense, sparse) == (TokenTimes(1.0, 10.0), TokenTimes(2.0, 10.0))
    assert dense.tokens_per_s == 0.1
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
