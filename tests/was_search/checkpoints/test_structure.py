from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from was_search.checkpoints import structure
from was_search.checkpoints.structure import find_structure
from was_search.errors import ModelError
from was_search.shape import PROJECTIONS

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WANTED = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


def build(family: str, **extra: object) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **extra})
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Llama", {}),
        ("Mistral", {}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Llama", {"num_hidden_layers": 1}),
        ("Gemma", {"head_dim": 8}),
        ("Gemma2", {"head_dim": 8}),
        ("Olmo2", {}),
    ],
)
def test_finds_the_blocks_of_known_families(family, extra):
    model = build(family, **extra)
    structure = find_structure(model)
    assert [block.module for block in structure.blocks] == list(model.model.layers)
    assert structure.blocks[0].name == "model.layers.0"
    for b, (block, layer) in enumerate(zip(structure.blocks, model.model.layers, strict=True)):
        for name in ("q", "k", "v", "o"):
            assert block.projections[name] is getattr(layer.self_attn, f"{name}_proj")
        for name in ("gate", "up", "down"):
            assert block.projections[name] is getattr(layer.mlp, f"{name}_proj")
        for p, name in enumerate(PROJECTIONS):
            weight = block.projections[name].weight
            assert structure.shape.params[b, p] == weight.numel()  # without the biases of Qwen2
            assert structure.shape.in_features[b][p] == weight.shape[1]
    if family == "Qwen2":
        assert structure.blocks[0].projections["q"].bias is not None


def test_linears_run_block_by_block_in_the_order_of_the_projections():
    structure = find_structure(build("Llama"))
    found = structure.linears()
    assert [(b, p) for b, p, _ in found] == [(b, p) for b in range(2) for p in range(7)]
    assert all(linear is structure.blocks[b].projections[PROJECTIONS[p]] for b, p, linear in found)


def test_the_backbone_alone_fits_too():
    assert find_structure(build("Llama").model).blocks[1].name == "layers.1"


def test_refuses_gpt2():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(
        ModelError, match=rf"GPT2LMHeadModel \(model_type gpt2\): no list .* {WANTED} was found; .*\(c_attn, c_fc\)"
    ):
        find_structure(model)


@pytest.mark.parametrize(
    ("family", "extra", "fused"),
    [
        ("Phi3", {}, r"gate_up_proj, qkv_proj"),
        ("Glm", {"head_dim": 4}, "gate_up_proj"),
        ("Glm4", {"head_dim": 4}, "gate_up_proj"),
    ],
)
def test_fused_maps_need_shared_masks(family, extra, fused):
    model = build(family, **extra)
    with pytest.raises(ModelError, match=rf"{family}\w+ \(model_type {family.lower()}\) .*\({fused}\).*--masks shared"):
        find_structure(model)
    structure = find_structure(model, "shared")
    assert structure.shape.in_features == ((16, 16, 16, 16, 16, 16, 24),) * 2
    assert structure.shape.out_features == ((16, 8, 8, 16, 24, 24, 16),) * 2
    layer = model.model.layers[1]
    inputs = {masked.members: masked.linears for masked in structure.inputs() if masked.block == 1}
    assert inputs[4, 5] == (layer.mlp.gate_up_proj,)
    assert structure.blocks[1].projections["gate"].weight.is_meta
    if family == "Phi3":
        assert inputs[0, 1, 2] == (layer.self_attn.qkv_proj,)
    else:
        assert inputs[0, 1, 2] == tuple(getattr(layer.self_attn, f"{name}_proj") for name in "qkv")


def test_a_fused_map_of_other_widths_is_refused():
    model = build("Phi3")
    model.model.layers[0].self_attn.qkv_proj = nn.Linear(16, 33)
    with pytest.raises(ModelError, match=r"layers\.0: a fused map of 33 outputs cannot be told apart into q, k, v"):
        find_structure(model, "shared")


def test_inputs_are_those_of_each_projection_or_of_each_group():
    model = build("Llama")
    separate, shared = find_structure(model), find_structure(model, "shared")
    assert [m.members for m in separate.inputs()] == [(p,) for p in range(7)] * 2
    assert [m.members for m in shared.inputs()] == [(0, 1, 2), (3,), (4, 5), (6,)] * 2
    assert shared.shape.masks == "shared"
    assert shared.shape.with_masks("separate") == separate.shape


@pytest.mark.parametrize(
    ("family", "extra", "why"),
    [
        ("GPTNeoX", {}, r"gpt_neox.* was found; it has other maps \(dense_h_to_4h, query_key_value\)"),
        ("Falcon", {}, r"falcon.* was found; it has other maps \(dense_h_to_4h, query_key_value\)"),
        ("Phi", {}, r"\(model_type phi\): .*missing: o_proj, gate_proj, up_proj, down_proj"),
        ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}, r"\(model_type opt\): .*missing: o_proj, gate_proj"),
        ("Bert", {"is_decoder": True}, "model_type bert.*: no list of decoder blocks"),
    ],
)
def test_other_families_are_refused_by_type_with_what_is_missing(family, extra, why):
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **extra})
    name = {"Bert": "BertLMHeadModel"}.get(family, f"{family}ForCausalLM")
    for masks in ("separate", "shared"):
        with pytest.raises(ModelError, match=why):
            find_structure(getattr(transformers, name)(config), masks)


def test_another_name_of_a_map_is_found_and_named_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a family would be added that calls the output projection ``wo``."""
    monkeypatch.setitem(structure._NAMES, "o", ("o_proj", "wo"))
    monkeypatch.setitem(structure._SUFFIXES, "wo", "o")
    model = build("Llama")
    for layer in model.model.layers:
        layer.self_attn.wo = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    assert find_structure(model).shape == find_structure(build("Llama")).shape
    for layer in model.model.layers:
        del layer.self_attn.wo
    with pytest.raises(ModelError, match=rf"looked for the linear maps {WANTED}; missing: o_proj$"):
        find_structure(model)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("Mixtral", {"num_local_experts": 2}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
        # Its shared expert alone has each name once: it must not pass for the whole block.
        (
            "Qwen2Moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": 8,
            },
        ),
    ],
)
def test_refuses_a_mixture_of_experts(family, extra):
    with pytest.raises(ModelError, match=rf"mixture of experts; only models with the seven projections {WANTED}"):
        find_structure(build(family, **extra))


def test_refuses_a_projection_that_occurs_twice():
    model = build("Llama")
    model.model.layers[1].extra = nn.ModuleDict({"up_proj": nn.Linear(4, 4)})
    with pytest.raises(ModelError, match=r"model\.layers\.1: up_proj occurs more than once \(a mixture of experts\?\)"):
        find_structure(model)


def test_refuses_a_model_without_blocks():
    with pytest.raises(ModelError, match="Linear: no list of decoder blocks"):
        find_structure(nn.Linear(2, 2))


def test_refuses_a_projection_that_is_not_linear():
    model = build("Llama")
    model.model.layers[0].mlp.up_proj = nn.Conv1d(4, 4, 1)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj: a Conv1d of torch.float32 where a torch.nn.Linear"):
        find_structure(model)


class PackedLinear(nn.Linear):
    """As quantisation libraries do it: a Linear by name, with a packed weight."""


@pytest.mark.parametrize("weight", [torch.zeros(16 * 24 // 2, 1, dtype=torch.uint8), torch.zeros(3, 4)])
def test_refuses_packed_weights_in_a_subclass_of_linear(weight):
    model = build("Llama")
    packed = PackedLinear(16, 24, bias=False)
    packed.weight = nn.Parameter(weight, requires_grad=False)
    model.model.layers[1].mlp.up_proj = packed
    with pytest.raises(ModelError, match=r"a PackedLinear of torch\.\w+ where .*load the checkpoint unquantised"):
        find_structure(model)
