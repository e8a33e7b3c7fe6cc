"""Which batches of vLLM are masked, what its layers hold, and what is refused: without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.numpy import load

from benchmarks.harness.random_models import compensated
from tests.doubles.tiny_models import tiny_model, tiny_plan
from was_kernels.runtime.vllm_rules import PLAN_TENSORS, batch_of, projections_of, require_served
from was_search.errors import ConfigError
from was_search.plan import TENSORS_NAME


@pytest.mark.parametrize(
    ("prefix", "held"),
    [
        ("model.layers.0.self_attn.qkv_proj", (0, (0, 1, 2))),
        ("model.layers.11.self_attn.o_proj", (11, (3,))),
        ("language_model.model.layers.2.mlp.gate_up_proj", (2, (4, 5))),
        ("layers.3.mlp.down_proj", (3, (6,))),
        ("model.layers.4.self_attn.k_proj", (4, (1,))),
        ("model.layers.4.mlp.experts.0.up_proj", None),
        ("model.layers.4.self_attn.kv_b_proj", None),
        ("lm_head", None),
    ],
)
def test_projections_by_the_names_of_layers(prefix, held):
    assert projections_of(prefix) == held


def test_a_plans_tensors_are_told_from_weights(tmp_path):
    folder = compensated(tiny_plan(tiny_model())).save(tmp_path)
    names = load((folder / TENSORS_NAME).read_bytes())
    assert len(names) == 2 + 3 * 14
    assert all(PLAN_TENSORS.match(name) for name in names)
    assert not PLAN_TENSORS.match("model.layers.0.input_layernorm.weight")


def metadata(longest: int, lengths: list[int]) -> dict[str, SimpleNamespace]:
    return {"model.layers.0.attn": SimpleNamespace(max_query_len=longest, seq_lens=torch.tensor(lengths))}


def test_steps_are_masked_and_prompts_are_not():
    step = batch_of(metadata(1, [9, 4]), 2, 1, piecewise=False)
    assert step.one_token and step.dense is None
    for prompt in (metadata(5, [5]), metadata(4, [4, 9]), None, {}, [metadata(1, [9])]):
        assert not batch_of(prompt, 5, 1, piecewise=False).one_token


def test_a_prompt_of_one_token_lies_in_the_dense_prefix():
    step = batch_of(metadata(1, [9, 1, 3]), 3, 1, piecewise=False)
    assert step.one_token and step.dense is not None and step.dense.tolist() == [False, True, False]
    assert batch_of(metadata(1, [9, 1, 3]), 3, 0, piecewise=False).dense is None


def test_graphs_of_parts_are_for_prompts_too_and_stay_dense():
    assert not batch_of(metadata(1, [9]), 1, 1, piecewise=True).one_token


def test_padding_without_lengths_is_dense():
    assert not batch_of(metadata(1, [9, 4]), 4, 1, piecewise=False).one_token


@pytest.mark.parametrize(("prefills", "tokens", "masked"), [(0, 3, True), (1, 3, False), (0, 6, False)])
def test_attention_that_counts_its_requests(prefills, tokens, masked):
    found = SimpleNamespace(num_prefills=prefills, num_decodes=3, num_decode_tokens=tokens)
    assert batch_of({"attn": found}, 3, 1, piecewise=False).one_token == masked


def config(**changes: object) -> SimpleNamespace:
    values: dict[str, object] = {"tensor": 1, "pipeline": 1, "lora": None, "drafter": None, **changes}
    parallel = SimpleNamespace(tensor_parallel_size=values["tensor"], pipeline_parallel_size=values["pipeline"])
    return SimpleNamespace(parallel_config=parallel, lora_config=values["lora"], speculative_config=values["drafter"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 2}, "tensor parallelism: .* --tensor-parallel-size 1"),
        ({"pipeline": 2}, "pipeline parallelism: .* --pipeline-parallel-size 1"),
        ({"lora": object()}, "LoRA: .* without --enable-lora"),
        ({"drafter": object()}, "a speculative drafter: .* without --speculative-config"),
    ],
)
def test_what_a_plan_is_not_served_with(changes, message):
    with pytest.raises(ConfigError, match=f"^a plan is not served with {message}$"):
        require_served(config(**changes), None)


def test_other_quantisation_is_refused():
    require_served(config(), None)
    with pytest.raises(ConfigError, match=r"^a plan is not served with another quantisation: .*weights as stored"):
        require_served(config(), object())
