"""Attention of backward passes adds in a fixed order and leaves PyTorch's and the model's settings as they were."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.doubles.tiny_models import model_of, tiny_model
from was_search.masks.attention import attention_in_order, needs_no_mask


def settings_of(model) -> tuple:
    return (
        model.config._attn_implementation,
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        ({"_attn_implementation": "sdpa"}, True),
        ({"_attn_implementation": "sdpa", "sliding_window": None, "layer_types": ["full_attention"]}, True),
        ({"_attn_implementation": "sdpa", "sliding_window": 16, "layer_types": ["sliding_attention"]}, True),
        ({"_attn_implementation": "sdpa", "sliding_window": 15, "layer_types": ["sliding_attention"]}, False),
        ({"_attn_implementation": "sdpa", "layer_types": ["full_attention", "chunked_attention"]}, False),
        ({"_attn_implementation": "eager"}, False),
        ({"_attn_implementation": "a function without a mask"}, True),
    ],
)
def test_what_attention_needs_no_mask(config, plain):
    assert needs_no_mask(SimpleNamespace(**config), 16) is plain


def gradient(model, tokens):
    start = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    logits = model(inputs_embeds=start).logits
    return logits.detach(), torch.autograd.grad(logits.float().square().sum(), start)[0]


@pytest.mark.parametrize("window", [None, 4, 64])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_the_same_numbers_as_without_it(kind, window):
    model = tiny_model(kind).requires_grad_(False)
    if kind == "mistral":
        model.config.sliding_window = window
    tokens = torch.randint(0, model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    before, expected = settings_of(model), gradient(model, tokens)
    with attention_in_order(model, 16):
        assert model.config._attn_implementation != "sdpa"
        found = gradient(model, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert settings_of(model) == before


def test_only_attention_is_asked_for_an_order(monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    tokens = torch.arange(16)[None] % model.config.vocab_size
    modes = {}

    def watch(name, module):
        def saw(*_):
            modes.setdefault(name, set()).add(torch.get_deterministic_debug_mode())

        module.register_full_backward_pre_hook(saw)

    for name, module in model.named_modules():
        if name.endswith("proj"):
            watch(name.rpartition(".")[2], module)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *args, **kwargs):
        query.register_hook(lambda grad: seen.append(torch.get_deterministic_debug_mode()))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with attention_in_order(model, 16):
        gradient(model, tokens)
    assert seen == [2] * model.config.num_hidden_layers
    assert len(modes) == 7
    assert set.union(*modes.values()) == {0}


def test_a_failed_pass_leaves_no_switch_on(monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    before = settings_of(model)

    def stumble(query, *args, **kwargs):
        def fail(grad):
            raise RuntimeError("no memory")

        query.register_hook(fail)
        return attend(query, *args, **kwargs)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", stumble)
    with pytest.raises(RuntimeError, match="no memory"), attention_in_order(model, 16):
        gradient(model, torch.arange(16)[None] % model.config.vocab_size)
    assert settings_of(model) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length", [64, 1024])
def test_bits_on_a_gpu_do_not_change_from_run_to_run(dtype, length):
    model = model_of("llama", "cuda", dtype, max_position_embeddings=1024).requires_grad_(False)
    tokens = torch.randint(0, model.config.vocab_size, (8, length), generator=torch.Generator().manual_seed(1)).cuda()
    with attention_in_order(model, length):
        expected = gradient(model, tokens)[1]
        for _ in range(8):
            assert torch.equal(gradient(model, tokens)[1], expected)
