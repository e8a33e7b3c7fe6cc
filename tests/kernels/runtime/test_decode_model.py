"""A decoder's own steps: what they take, and that they equal transformers' way through the same fused blocks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from tests.doubles.tiny_models import FUSED_STEPS, WIDER, logits_of_steps, model_of, tiny_plan, tokens_of
from was_kernels.runtime import decode_model
from was_kernels.runtime.decode_model import DecodeModel
from was_kernels.runtime.sparse_model import sparsify


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


@pytest.mark.parametrize("family", FUSED_STEPS)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_same_blocks_called_by_transformers(family, batch, op_device, dtype, runs, monkeypatch):
    model = model_of(family, op_device, dtype)
    plan = tiny_plan(model, dense_prefix=12)  # the first four of twelve steps lie inside it
    tokens = tokens_of(batch, 20).to(op_device)
    with sparsify(model, plan, backend="cuda", graphs=False) as sparse:
        found = logits_of_steps(sparse, tokens, 8)
    assert runs == [batch] * 12
    monkeypatch.setattr(decode_model, "fits", lambda decoder: False)
    with sparsify(model, plan, backend="cuda", graphs=False) as sparse:
        expected = logits_of_steps(sparse, tokens, 8)
    assert runs == [batch] * 12
    if op_device == "cpu":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:  # other orders of float32 sums move a few scores over their threshold
        assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert type(model.model).__name__ == type(model.model).__mro__[0].__name__
    assert "_was_step" not in vars(model.model)


def test_scaled_angles_and_generate(op_device, dtype, runs):
    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(**WIDER, rope_parameters=rope)).eval().to(op_device, dtype)
    assert model.model.rotary_emb.attention_scaling != 1.0
    plan = tiny_plan(model)
    tokens = tokens_of(2, 7).to(op_device)
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    with sparsify(model, plan, backend="reference") as sparse:
        expected = sparse.generate(tokens, **options)
    with sparsify(model, plan, backend="cuda", graphs=False) as sparse:
        found = sparse.generate(tokens, cache_implementation="static", **options)
    assert runs
    if op_device == "cpu":
        assert torch.equal(found, expected)


KEPT = (
    "hidden states",
    "embeddings",
    "no cache",
    "a hook on a block",
    "a hook inside a block",
    "an own forward on a block",
    "an own forward inside a block",
    "int32",
    "offloaded",
)


@pytest.mark.parametrize("kind", KEPT)
def test_what_transformers_keeps(op_device, dtype, kind, runs, monkeypatch):
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(1, 9).to(op_device)
    with sparsify(model, tiny_plan(model), backend="cuda", graphs=False) as sparse, torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=16)
        sparse(tokens[:, :8], past_key_values=cache, use_cache=True)
        given: dict[str, Any] = {"input_ids": tokens[:, 8:], "past_key_values": cache, "use_cache": True}
        seen: list[Any] = []
        block = model.model.layers[1]
        within = block.mlp.down_proj if "inside" in kind else block
        if kind == "hidden states":
            given["output_hidden_states"] = True
        elif kind == "embeddings":
            given["inputs_embeds"] = model.model.embed_tokens(given.pop("input_ids"))
        elif kind == "no cache":
            given = {"input_ids": tokens[:, 8:]}
        elif kind == "int32":
            given["input_ids"] = given["input_ids"].int()
        elif kind == "offloaded":
            cache.offloading = True  # as if: this one's layers stay where they are
            monkeypatch.setattr(cache, "update", lambda k, v, layer, *_, **__: cache.layers[layer].update(k, v))
        elif kind.startswith("a hook"):
            within.register_forward_hook(lambda *args: seen.append(args))
        elif kind.startswith("an own"):
            before = within.forward

            def own(*args: Any, **kwargs: Any) -> Any:
                seen.append(args)
                return before(*args, **kwargs)

            within.forward = own
        found = sparse(**given)
    assert len(seen) == ("block" in kind)
    assert not runs
    assert found.logits.isfinite().all()
    if kind == "hidden states":
        assert len(found.hidden_states) == 3


def test_outputs_that_were_wanted_once_do_not_end_the_decoders_own_steps(op_device, dtype, runs):
    """transformers leaves hooks behind that capture them."""
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(1, 12).to(op_device)
    with sparsify(model, tiny_plan(model), backend="cuda", graphs=False) as sparse:
        with torch.inference_mode():
            assert len(sparse(tokens, output_hidden_states=True).hidden_states) == 3
        assert any(module._forward_hooks for module in model.modules())
        logits_of_steps(sparse, tokens, 8)
    assert runs == [1] * 4


def test_a_tuple_where_one_is_asked_for(op_device, dtype, runs):
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(1, 9).to(op_device)
    with sparsify(model, tiny_plan(model), backend="cuda", graphs=False), torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model.model(tokens[:, :8], past_key_values=cache, use_cache=True)
        found = model.model(tokens[:, 8:], past_key_values=cache, use_cache=True, return_dict=False)
    assert isinstance(found, tuple) and found[0].shape == (1, 1, model.config.hidden_size)
    assert not runs


@pytest.mark.parametrize("kind", ["a slice", "expanded"])
def test_embeddings_that_are_views(op_device, dtype, kind):
    """Rows of a view lie apart, or on one another; a launch wants them side by side."""
    model = model_of("llama", op_device, dtype)
    tokens = tokens_of(2, 12).to(op_device)
    if kind == "expanded":
        tokens = tokens[:1].expand(2, 12)
    found = []
    with sparsify(model, tiny_plan(model), backend="cuda", graphs=False) as sparse, torch.inference_mode():
        embedded = model.model.embed_tokens(tokens[:1] if kind == "expanded" else tokens)
        for copied in (False, True):
            cache = StaticCache(config=model.config, max_cache_len=16)
            sparse(tokens[:, :8], past_key_values=cache, use_cache=True)
            for at in range(8, 12):
                step = embedded[:, at : at + 1].expand(2, 1, embedded.shape[2])
                step = step.contiguous() if copied else step
                found.append(sparse(inputs_embeds=step, past_key_values=cache, use_cache=True).logits)
    assert not (kind == "a slice" and torch.equal(found[0][0], found[0][1]))
    assert torch.equal(torch.stack(found[:4]), torch.stack(found[4:]))


@pytest.mark.gpu
def test_a_step_beyond_a_full_cache_ends_in_an_error_not_in_anothers_memory(cuda):
    program = """
        import torch
        from transformers import StaticCache
        from tests.doubles.tiny_models import model_of, tiny_plan, tokens_of
        from was_kernels.runtime.sparse_model import sparsify
        model = model_of("llama", "cuda", torch.float16)
        tokens = tokens_of(1, 18).cuda()
        cache = StaticCache(config=model.config, max_cache_len=16)
        with sparsify(model, tiny_plan(model), backend="cuda", graphs=False), torch.inference_mode():
            model(tokens[:, :15], past_key_values=cache, use_cache=True)
            model(tokens[:, 15:16], past_key_values=cache, use_cache=True)
            torch.cuda.synchronize()
            print("full")
            model(tokens[:, 16:17], past_key_values=cache, use_cache=True)
            torch.cuda.synchronize()
            print("beyond")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout.split() == ["full"]
    assert "CUDA error" in done.stderr or "cuda" in done.stderr


def test_sequences_whose_angles_change_are_left_to_transformers():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**WIDER, rope_parameters=rope))
    assert not decode_model.fits(model.model.half())
    assert decode_model.fits(model_of("llama", "cpu", torch.float16).model)
