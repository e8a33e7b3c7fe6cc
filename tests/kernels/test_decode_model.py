"""A decoder's own steps: what they take, and that they equal transformers' way through the same fused blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from tests.kernels.test_decode_block import FAMILIES, dtype, logits_of_steps, model_of, tokens_of  # noqa: F401 - dtype is a fixture
from tests.kernels.tiny_models import WIDER, tiny_plan
from was_kernels import decode_model
from was_kernels.decode_model import DecodeModel
from was_kernels.reference import rms_norm as plain_rms_norm
from was_kernels.runtime import sparsify
from was_kernels.step_ends import begin_step, rms_norm


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that a decoder took itself."""
    taken: list[int] = []
    run = DecodeModel.run

    def counted(self: DecodeModel, given: dict[str, Any]) -> Any:
        taken.append(len(given["input_ids"]))
        return run(self, given)

    monkeypatch.setattr(DecodeModel, "run", counted)
    return taken


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_same_blocks_called_by_transformers(family, batch, op_device, dtype, runs, monkeypatch):  # noqa: F811
    model = model_of(family, op_device, dtype)
    plan = tiny_plan(model, dense_prefix=12)  # the first four of twelve steps lie inside it
    tokens = tokens_of(batch, 20).to(op_device)
    with sparsify(model, plan, backend="cuda") as sparse:
        found = logits_of_steps(sparse, tokens, 8)
    assert runs == [batch] * 12
    monkeypatch.setattr(decode_model, "fits", lambda decoder: False)
    with sparsify(model, plan, backend="cuda") as sparse:
        expected = logits_of_steps(sparse, tokens, 8)
    assert runs == [batch] * 12
    if op_device == "cpu":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:  # other orders of float32 sums move a few scores over their threshold
        assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert type(model.model).__name__ == type(model.model).__mro__[0].__name__
    assert "_was_step" not in vars(model.model)


def test_scaled_angles_and_generate(op_device, dtype, runs):  # noqa: F811
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**WIDER, rope_parameters=rope)).eval().to(op_device, dtype)
    assert model.model.rotary_emb.attention_scaling != 1.0
    plan = tiny_plan(model)
    tokens = tokens_of(2, 7).to(op_device)
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    with sparsify(model, plan, backend="reference") as sparse:
        expected = sparse.generate(tokens, **options)
    with sparsify(model, plan, backend="cuda") as sparse:
        found = sparse.generate(tokens, cache_implementation="static", **options)
    assert runs
    if op_device == "cpu":
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["hidden states", "embeddings", "no cache", "a hook on a block"])
def test_what_transformers_keeps(op_device, dtype, kind, runs):  # noqa: F811
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(1, 9).to(op_device)
    with sparsify(model, tiny_plan(model), backend="cuda") as sparse, torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=16)
        sparse(tokens[:, :8], past_key_values=cache, use_cache=True)
        given: dict[str, Any] = {"input_ids": tokens[:, 8:], "past_key_values": cache, "use_cache": True}
        handle = None
        if kind == "hidden states":
            given["output_hidden_states"] = True
        elif kind == "embeddings":
            given["inputs_embeds"] = model.model.embed_tokens(given.pop("input_ids"))
        elif kind == "no cache":
            given = {"input_ids": tokens[:, 8:]}
        elif kind == "a hook on a block":
            seen: list[Any] = []
            handle = model.model.layers[1].register_forward_hook(lambda *args: seen.append(args))
        found = sparse(**given)
        if handle is not None:
            handle.remove()
            assert len(seen) == 1
    assert not runs
    assert found.logits.isfinite().all()
    if kind == "hidden states":
        assert len(found.hidden_states) == 3


def test_sequences_whose_angles_change_are_left_to_transformers():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**WIDER, rope_parameters=rope))
    assert not decode_model.fits(model.model.half())
    assert decode_model.fits(model_of("llama", "cpu", torch.float16).model)


def test_the_beginning_of_a_step(op_device):
    half = torch.float16 if op_device == "cuda" else torch.float32
    model = model_of("llama", op_device, half, hidden_size=512, num_attention_heads=8)
    rotary, table = model.model.rotary_emb, model.model.embed_tokens.weight
    tokens = torch.tensor([5, 96, 0], device=op_device)
    for positions in (torch.tensor([7, 0, 4000], device=op_device), torch.tensor([12], device=op_device)):
        x, cos, sin, dense, squares = begin_step(
            tokens, table, positions, rotary.inv_freq.float(), scaling=1.5, prefix=12
        )
        expected = rotary(table, positions[:, None])
        assert torch.equal(x, table[tokens])
        torch.testing.assert_close(cos, 1.5 * expected[0][:, 0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(sin, 1.5 * expected[1][:, 0], rtol=2e-3, atol=2e-3)
        assert dense.tolist() == [bool(p < 12) for p in positions.expand(3)]
        torch.testing.assert_close(squares.sum(1), x.float().square().sum(1))


@pytest.mark.parametrize("d", [8, 520, 4096])
def test_the_norm_behind_the_last_block(op_device, d):
    half = torch.bfloat16 if op_device == "cuda" else torch.float32
    made = torch.Generator().manual_seed(d)
    x, weight = (
        torch.randn(3, d, generator=made).to(op_device, half),
        torch.randn(d, generator=made).to(op_device, half),
    )
    x[1] = 0.0
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain_rms_norm(x, weight, 1e-5), rtol=1e-2, atol=1e-6)
    torch.library.opcheck(torch.ops.was.rms_norm, (x, weight, 1e-5))
