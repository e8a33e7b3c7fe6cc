"""Masks of the profile: what they say is what steps have; and on a GPU, that a profile predicts unseen vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.doubles.tiny_models import model_of, tokens_of
from was_kernels.runtime.sparse_model import sparsify
from was_kernels.timing.profile import StepClock, profile_plan
from was_search.checkpoints.quantised import quantise_projections
from was_search.checkpoints.structure import find_structure
from was_search.decode_time.fit import FUSED, check, check_summary, fit, launch_kinds
from was_search.decode_time.profile import LatencyProfile
from was_search.weight_format import WeightFormat

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_fixed_masks_are_what_steps_count(op_device, dtype, backend):
    model = model_of("llama", op_device, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    widths = np.array(find_structure(model).shape.in_features)
    with StepClock(model, tokens_of(1, 80).to(op_device), 40, steps=2, backend=backend) as clock:
        assert clock.fused == (backend == "cuda")
        for vector in (np.zeros((2, 7)), RNG.uniform(0, 0.98, (2, 7)), np.full((2, 7), 1.0)):
            seconds, achieved = clock(vector)
            assert seconds > 0.0
            counted = clock._step.counted(clock._handle).sparsities
            # A channel whose input is exactly 0 counts as dropped, whatever its norm: in half precision a few are.
            np.testing.assert_allclose(counted, achieved, atol=1e-9 if dtype == torch.float32 else 4e-3)
            assert np.all(np.abs(achieved - vector) <= 1.0 / widths + 1e-12)  # whole channels, at least one
            assert achieved.max() < 1.0  # a launch always reads something
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fixed_masks_of_rounded_weights_are_what_steps_count(op_device, dtype, weights):
    model = model_of("llama", op_device, dtype)
    quantise_projections(find_structure(model), WeightFormat.parse(weights))
    vector = RNG.uniform(0, 0.98, (2, 7))
    with StepClock(model, tokens_of(1, 80).to(op_device), 40, steps=2, backend="cuda") as clock:
        seconds, achieved = clock(vector)
        counted = clock._step.counted(clock._handle).sparsities
    assert seconds > 0.0
    np.testing.assert_allclose(counted, achieved, atol=1e-9 if dtype == torch.float32 else 4e-3)
    np.testing.assert_allclose(achieved, vector, atol=1.0 / 64)


@pytest.mark.parametrize("rows", [1, 3])
def test_masks_by_score_are_counted(op_device, dtype, rows):
    model = model_of("qwen3", op_device, dtype)
    with StepClock(model, tokens_of(rows, 80).to(op_device), 40, steps=2, backend="reference") as clock:
        _, dense = clock.by_score(np.zeros((2, 7)))
        np.testing.assert_allclose(dense, 0.0, atol=0.0 if dtype == torch.float32 else 4e-3)
        wanted = np.full((2, 7), 0.5)
        _, achieved = clock.by_score(wanted)
        # Thresholds are of the dense model on 40 tokens a row, steps of 8 others under the masks of the blocks before.
        assert np.abs(achieved - wanted).max() < 0.35
        assert abs(achieved.mean() - 0.5) < 0.15
        if rows > 1:
            _, same = clock(wanted)
            np.testing.assert_array_equal(same, achieved)


def test_fused_steps_read_the_norms_that_were_written_last(op_device, dtype):
    model = model_of("llama", op_device, dtype)
    found = []
    with StepClock(model, tokens_of(1, 80).to(op_device), 40, steps=2, backend="cuda") as clock, torch.inference_mode():
        for level in (0.0, 0.9, 0.0):
            clock._masks.set(np.full((2, 7), level), clock._step)
            clock._step._rewind(39)
            clock._step._next(0)
            found.append(clock._step.run())
        clock(np.zeros((2, 7)))
        call = clock._step._graph
        assert call is not None
        clock(np.full((2, 7), 0.9))
        assert clock._step._graph is call  # what was captured is used again
    torch.testing.assert_close(found[0], found[2])
    assert (found[0] - found[1]).abs().max() > 0.1


def test_the_plan_keeps_everything(op_device, dtype):
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(1, 20).to(op_device)
    with torch.inference_mode():
        expected = model(tokens).logits
        with sparsify(model, profile_plan(model), backend="reference") as sparse:
            torch.testing.assert_close(sparse(tokens).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_profile_predicts_unseen_vectors_within_five_percent(cuda, half):
    """Four blocks of a Llama-2-7B's widths, 20 random vectors masked by score."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        num_hidden_layers=4,
        vocab_size=32000,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    with torch.device(cuda):
        model = LlamaForCausalLM(config).to(half).eval()
    shape = find_structure(model).shape
    tokens = torch.randint(0, 32000, (1, 512), device=cuda)
    with StepClock(model, tokens, 256) as clock:
        assert clock.backend == "cuda, fused"
        clock(np.full(shape.params.shape, 0.5))
        found = fit(clock, shape, launch_kinds(shape, FUSED), rounds=3)
        profile = LatencyProfile(
            shape, found.curves, found.rest_seconds, {"eager": 1.0}, "gpu", "half", clock.backend, 1, 256
        )
        assert check_summary(check(clock.by_score, profile, 20))["max_error"] <= 0.05
        assert check_summary(check(clock, profile, 20, seed=2))["max_error"] <= 0.05
