"""Blocks on several devices: that nothing meets what lies elsewhere, and that accelerate's hooks change no number."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

from tests.doubles.several_devices import SECOND, pretended
from tests.doubles.tiny_models import tiny_model, tiny_plan
from tests.was_search.conftest import build_llama
from was_kernels import sparsify
from was_kernels.runtime import sparse_model
from was_search.checkpoints.load import _require_no_offload
from was_search.errors import ResourceError
from was_search.masks.beside_dense import evaluate_beside_dense
from was_search.masks.block_error import block_error
from was_search.masks.calibration import histogram_pass
from was_search.masks.divergence import DenseTop
from was_search.masks.evaluation import dense_top, evaluate_thresholds
from was_search.masks.histogram import N_BINS, Histograms
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.masks.pricing import price_sums
from was_search.masks.slope import slope_pass
from was_search.texts.protocol import TokenSet

SHAPE = (3, 7)
HALF = np.full(SHAPE, 0.5)
THRESHOLDS = np.full(SHAPE, 0.1, np.float32)
LEVELS = np.sort(np.random.default_rng(0).uniform(0, 1, (*SHAPE, 5)), axis=-1).astype(np.float32)
COUNTS = Histograms(np.random.default_rng(1).integers(0, 9, (*SHAPE, N_BINS)))


@pytest.fixture
def data(tokens, make_data) -> TokenSet:
    """A whole batch and a part of one: where tensors lie is the same in every batch."""
    return make_data(tokens[:5])


def evaluate(top: bool) -> Callable[..., Any]:
    def run(model: MaskedModel, data: TokenSet) -> Any:
        n, predicted = len(data.tokens), data.protocol.predicted_per_sequence
        found = DenseTop(np.zeros((n, predicted, 4), np.int32), np.full((n, predicted, 5), -2.0, np.float32))
        return evaluate_thresholds(model, data, THRESHOLDS, top=found if top else None)

    return run


def beside_dense(model: MaskedModel, data: TokenSet) -> Any:
    return tuple(evaluate_beside_dense(model, data, [Masking(model, THRESHOLDS, count=True)]))


def recomputing(model: MaskedModel) -> MaskedModel:
    return dataclasses.replace(model, recompute=True)


PASSES: dict[str, Callable[[MaskedModel, TokenSet], Any]] = {
    "histograms": lambda model, data: histogram_pass(model, data, THRESHOLDS),
    "prices": lambda model, data: price_sums(model, data, LEVELS),
    "prices, recomputed": lambda model, data: price_sums(recomputing(model), data, LEVELS),
    "slopes": lambda model, data: slope_pass(model, data, HALF, COUNTS),
    "slopes, recomputed": lambda model, data: slope_pass(recomputing(model), data, HALF, COUNTS),
    "evaluation": evaluate(top=False),
    "divergence": evaluate(top=True),
    "beside dense": beside_dense,
    "dense top": lambda model, data: dense_top(model, data, 4),
    "greedy table": lambda model, data: block_error(model, data, 2, COUNTS)(np.full(7, 0.5)),
}


@pytest.mark.parametrize("name", PASSES)
def test_every_tensor_meets_only_its_own_device(name: str, data) -> None:
    model = build_llama()
    with pretended(model, 1) as watch:
        masked = MaskedModel.of(model, "l2")
        assert [device.type for device in masked.block_devices] == ["cpu", SECOND, SECOND]
        PASSES[name](masked, data)
        assert watch.on_second > 50, "two blocks, the norm and the head"


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_the_sparse_runtime_keeps_to_each_device_too(prefill: str, monkeypatch) -> None:
    """A prompt and a one-token step, as `evaluate --tasks` and `generate` do over several GPUs; the plain reference."""
    model = tiny_model(dtype=torch.float32)
    plan = dataclasses.replace(tiny_plan(model), prefill=prefill)
    monkeypatch.setattr(sparse_model, "_require_own_weights", lambda _: None)  # our second device is called meta
    with pretended(model, 1) as watch, sparsify(model, plan, backend="reference"):
        prompt = torch.zeros((2, 5), dtype=torch.int64)
        with torch.no_grad():  # without a cache, whose empty beginning this pretence cannot hold
            model(prompt, use_cache=False)
            before = watch.on_second
            model(prompt[:, :1], use_cache=False)
        assert watch.on_second - before > 30, "a block, the norm and the head"


def test_a_tensor_on_another_device_is_caught(data) -> None:
    """Guards the test above: with one block's norms left behind, every pass that uses them must fail."""
    for name in set(PASSES) - {"dense top"}:
        model = build_llama()
        with pretended(model, 1):
            masked = MaskedModel.of(model, "l2")
            masked.norms[2] = [torch.ones(len(norm)) for norm in masked.norms[2]]
            with pytest.raises((AssertionError, RuntimeError), match=r"gets tensors on|devices"):
                PASSES[name](masked, data)


@pytest.mark.parametrize("name", PASSES)
def test_accelerates_hooks_change_no_number(name: str, data) -> None:
    """Each module's forward is accelerate's own then: recomputation must wrap it and put it back."""
    model = build_llama()
    hooked = copy.deepcopy(model)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(3)}
    dispatch_model(hooked, places, main_device="cpu", force_hooks=True)
    forwards = [layer.__dict__["forward"] for layer in hooked.model.layers]
    found = []
    for each in (model, hooked, hooked):
        found.append(PASSES[name](MaskedModel.of(each, "l2"), data))
    assert [layer.__dict__["forward"] for layer in hooked.model.layers] == forwards
    for other in found[1:]:
        for a, b in zip(numbers(found[0]), numbers(other), strict=True):
            np.testing.assert_array_equal(a, b)


def numbers(found: Any) -> list[Any]:
    """The arrays of a result, its time left out."""
    if isinstance(found, tuple):
        return [array for item in found for array in numbers(item)]
    if hasattr(found, "__dataclass_fields__"):
        return [array for name, value in vars(found).items() if name != "seconds" for array in numbers(value)]
    return [] if found is None else [np.asarray(found)]


def test_a_model_that_does_not_fit_its_gpus_is_refused() -> None:
    _require_no_offload({"model.embed_tokens": 0, "model.layers.0": 1})
    _require_no_offload({"": "cpu"})
    for left in ("cpu", "disk"):
        with pytest.raises(ResourceError, match=r"does not fit its GPUs: 1 part.*layers\.9; give it"):
            _require_no_offload({"model.layers.0": 0, "model.layers.9": left})
