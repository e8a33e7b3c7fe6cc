"""The benchmark of decoding steps, on a CPU: which steps are timed, and that a compensation is really left out."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decode_step
from benchmarks.harness.random_models import compensated, plan_at
from scripts.make_random_model import SHAPES
from tests.doubles.tiny_models import model_of, tokens_of
from was_kernels.runtime.sparse_model import sparsify


def test_a_compensated_step_is_timed_in_turn_with_the_same_without(monkeypatch):
    monkeypatch.setattr(decode_step, "ROUNDS", 3)
    monkeypatch.setitem(SHAPES, "tiny here", {})
    model = model_of("llama", "cpu", torch.float32)
    given = ["--model", "tiny here", "--sparsities", "0.5", "--compensation", "--kv-length", "32", "--replays", "2"]
    dense, plain, corrected = decode_step.measure(model, 1, 1e9, decode_step.parse(given))
    assert (dense.path, plain.path, corrected.path) == ("dense", "cpu", "cpu, compensated")
    assert dense.over_uncompensated is None and plain.over_uncompensated is None
    assert corrected.over_uncompensated is not None and corrected.over_uncompensated > 0.0
    assert plain.sparsity == pytest.approx(0.5, abs=0.2)
    assert "times as long as without" in decode_step.line(corrected)
    assert "times as long as without" not in decode_step.line(plain)


def test_a_step_made_without_the_compensation_has_none():
    model, tokens = model_of("llama", "cpu", torch.float32), tokens_of(1, 6)
    plan = plan_at(model, 0.5)
    found = []
    with torch.inference_mode():
        with sparsify(model, plan, backend="reference") as sparse:
            found.append(sparse(tokens).logits)
        handle = sparsify(model, compensated(plan), backend="reference")
        corrected = model(tokens).logits
        with decode_step.uncorrected(handle):
            found.append(model(tokens).logits)
        assert torch.equal(*found)
        assert not torch.allclose(corrected, found[0], atol=0.01)
        assert torch.equal(model(tokens).logits, corrected)
