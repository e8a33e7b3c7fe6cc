from __future__ import annotations

import pytest
import torch

from benchmarks.harness.random_models import plan_at
from benchmarks.masked_forward import evaluations, measure, medians
from tests.doubles.tiny_models import masked_logits, tiny_model
from was_search.plan import Plan


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(0))


def plan_of(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Plan:
    like = torch.randint(0, 97, (1, 80), generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randint", lambda *_, **__: like)
        return plan_at(model, 0.5)


def test_what_is_timed_is_the_masked_evaluation(model, tokens, monkeypatch):
    plan = plan_of(model, monkeypatch)
    found = {name: way() for name, way in evaluations(model, plan, tokens).items()}
    with torch.inference_mode():
        expected = {
            "evaluation, dense": model(tokens).logits,
            "evaluation, masked": masked_logits(model, plan, tokens),
            "evaluation, masked by plain torch": masked_logits(model, plan, tokens),
        }
    for name, logits in expected.items():
        nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert found[name].losses.mean() == pytest.approx(float(nats), abs=1e-4)
    assert found["evaluation, masked"].achieved.mean() == pytest.approx(0.5, abs=0.1)


def test_every_way_is_timed_and_the_model_is_left_as_it_was(model, tokens, monkeypatch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("benchmarks.masked_forward.plan_at", lambda *_: plan_of(model, monkeypatch))
    found = measure(model, tokens, 0.5, repeats=1)
    assert set(found) == {
        "evaluation, dense",
        "evaluation, masked",
        "evaluation, masked by plain torch",
        "prompt, dense",
        "prompt, masked",
        "prompt, left dense by the plan",
        "prompt, dense again",
    }
    assert all(ms > 0 for ms in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_time_does_not_count():
    calls: list[int] = []
    found = medians({"way": lambda: calls.append(1)}, 3, torch.device("cpu"))
    assert len(calls) == 4
    assert set(found) == {"way"}
