from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from was_search.checkpoints.load import load_model, resolve_model
from was_search.checkpoints.quantised import QuantisedLinear, quantise_projections
from was_search.checkpoints.structure import find_structure
from was_search.errors import ConfigError, ModelError
from was_search.masks.masked_model import structure_norms
from was_search.weight_format import WeightFormat

FORMS = [WeightFormat(8, 32), WeightFormat(4, 32), WeightFormat(4)]


def linear_of(d_in: int = 37, d_out: int = 41, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(d_in)
    return nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(37,), (3, 37), (2, 5, 37), (0, 37)])
def test_forward_is_that_of_the_weight_written_out(form, shape):
    linear = linear_of()
    rounded = QuantisedLinear(linear, form)
    x = torch.randn(shape)
    expected = x.double() @ rounded.dense_weight().double().t() + linear.bias.double()
    torch.testing.assert_close(rounded(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert (rounded.dense_weight() - linear.weight).abs().max() < 0.03


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_reaches_the_input(bias):
    rounded = QuantisedLinear(linear_of(bias=bias), WeightFormat(4))
    plain = nn.Linear(37, 41, bias=bias).requires_grad_(False)
    plain.weight.copy_(rounded.dense_weight())
    if bias:
        plain.bias.copy_(rounded.bias)
    x = torch.randn(2, 5, 37)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = rounded(found), plain(expected)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_backward_pass_keeps_no_written_out_weight():
    rounded = QuantisedLinear(linear_of(), WeightFormat(4))
    kept: list[tuple[int, ...]] = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rounded(torch.randn(3, 37, requires_grad=True))
    assert (41, 37) not in kept and (37, 41) not in kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_its_own(dtype):
    rounded = QuantisedLinear(linear_of(dtype=dtype), WeightFormat(8))
    assert rounded.dtype == rounded.dense_weight().dtype == dtype
    assert rounded(torch.randn(2, 37, dtype=dtype)).dtype == dtype


def rounded_model(make_llama, form: WeightFormat, seed: int = 0):
    model = make_llama(seed=seed)
    quantise_projections(find_structure(model), form)
    return model


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_models_structure_is_found_again(make_llama, form):
    model = make_llama()
    before = find_structure(model)
    shape, weights = before.shape, before.weights
    norms = structure_norms(before, "l2")
    quantise_projections(before, form)
    found = find_structure(model)
    assert found.shape == shape
    assert (weights, found.weights) == ("none", str(form))
    for row, rounded in zip(norms, structure_norms(found, "l2"), strict=True):
        for a, b in zip(row, rounded, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)
    weight = found.blocks[1].projections["down"].dense_weight()
    torch.testing.assert_close(structure_norms(found, "l1")[1][6], weight.abs().sum(0))


def test_the_weights_before_are_freed(make_llama):
    model = make_llama()
    structure = find_structure(model)
    before = [weakref.ref(linear.weight) for _, _, linear in structure.linears()]
    quantise_projections(structure, WeightFormat(8))
    gc.collect()
    assert not any(weight() is not None for weight in before)


def test_several_formats_are_refused(make_llama):
    model = rounded_model(make_llama, WeightFormat(8))
    model.model.layers[1].mlp.up_proj = linear_of(16, 24, bias=False)
    with pytest.raises(ModelError, match="one format for all projections is needed, got int8:128, none"):
        _ = find_structure(model).weights


def test_saved_and_loaded_as_safetensors(make_llama, tmp_path):
    model = rounded_model(make_llama, WeightFormat(4, 32))
    tokens = torch.arange(12)[None]
    expected = model(tokens).logits
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    other = rounded_model(make_llama, WeightFormat(4, 32), seed=1)
    assert not torch.equal(other(tokens).logits, expected)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(tokens).logits, expected)


def test_a_copy_is_independent(make_llama):
    model = rounded_model(make_llama, WeightFormat(8))
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.packed.zero_()
    assert model.model.layers[0].mlp.up_proj.packed.any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(LlamaConfig(vocab_size=67, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", ["int8", "int4:32"])
def test_loading_rounds(folder, weights):
    model = load_model(resolve_model(str(folder)), dtype="float32", weights=weights)
    plain = load_model(resolve_model(str(folder)), dtype="float32")
    assert find_structure(model).weights == {"int8": "int8:128", "int4:32": "int4:32"}[weights]
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    tokens = torch.arange(9)[None]
    exact = plain(tokens).logits
    moved = (model(tokens).logits - exact).norm() / exact.norm()
    assert 0 < moved < (0.02 if weights == "int8" else 0.3)  # a step is about 1 % and 20 % of a weight


def test_loading_refuses_an_unknown_format_before_it_reads_weights(folder):
    with pytest.raises(ConfigError, match="weights: must be none, int8 or int4"):
        load_model(resolve_model(str(folder)), dtype="float32", weights="int2")
