"""Greedy continuations against whole forwards of the masked model in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.doubles.tiny_models import masked_logits, tiny_model, tiny_plan
from was_search.errors import ConfigError
from was_search.service.steps import continuations
from was_search.service.steps.continuations import Continuations, compare_continuations, require_room


def test_counts_to_the_first_difference():
    dense = np.array([[5, 6, 7, 8], [1, 2, 3, 4], [9, -1, -1, -1], [9, 9, -1, -1], [3, 3, 3, 3]])
    sparse = np.array([[5, 6, 7, 8], [1, 2, 0, 4], [9, -1, -1, -1], [9, 9, 9, -1], [0, 3, 3, 3]])
    found = Continuations.of(dense, sparse, 7)
    assert found == Continuations(5, 7, 4, equal=2 / 5, until_difference=(4 + 2 + 4 + 2 + 0) / 5)
    assert str(found).startswith("40.0 % of 5 greedy continuations stay the dense model's over 4 tokens; 2.4 tokens")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(continuations, "PROMPT_TOKENS", 9)
    monkeypatch.setattr(continuations, "NEW_TOKENS", 12)


def forward_by_forward(model, plan, prompt, ends):
    """Greedy tokens from whole forwards without a cache; -1 after an end. Prompts as the plan's prefill says."""
    ids, found = list(prompt), []
    for _ in range(12):
        tokens = torch.tensor([ids])
        if plan is None:
            with torch.inference_mode():
                logits = model(tokens, use_cache=False).logits
        else:
            prefix = len(prompt) if plan.prefill == "dense" else plan.dense_prefix
            logits = masked_logits(model, dataclasses.replace(plan, dense_prefix=prefix), tokens)
        found.append(int(logits[0, -1].argmax()))
        ids.append(found[-1])
        if found[-1] in ends:
            break
    return found + [-1] * (12 - len(found))


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_against_whole_forwards(short, prefill):
    model = tiny_model()
    plan = dataclasses.replace(tiny_plan(model, sparsity=0.3), prefill=prefill)
    prompts = np.random.default_rng(0).integers(2, 97, (5, 14))
    end = forward_by_forward(model, None, prompts[0, :9].tolist(), set())[5]
    model.generation_config.eos_token_id = end
    dense, sparse = (
        np.array([forward_by_forward(model, each, row[:9], {end}) for row in prompts.tolist()]) for each in (None, plan)
    )
    seen = []
    found, again = compare_continuations(model, [plan, plan], prompts, advance=lambda: seen.append(1))
    assert found == again == Continuations.of(dense, sparse, 9)
    assert 0.0 < found.until_difference < 12.0
    assert len(seen) == 15  # dense once


def test_a_plan_that_masks_nothing_changes_no_text(short):
    model = tiny_model()
    plan = tiny_plan(model)
    nothing = dataclasses.replace(plan, thresholds=np.zeros_like(plan.thresholds))
    (found,) = compare_continuations(model, [nothing], np.random.default_rng(1).integers(2, 97, (2, 9)))
    assert (found.equal, found.until_difference) == (1.0, 12.0)


def test_refuses_positions_that_are_too_few():
    require_room(128, 256)
    require_room(None, 256)
    with pytest.raises(ConfigError, match="continuations: prompts of 64 tokens and 64 new ones exceed the model's 127"):
        require_room(127, 256)
