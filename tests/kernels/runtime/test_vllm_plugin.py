"""Plans served by vLLM itself, on a CPU. ``make test-vllm`` makes an environment for these."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness.random_models import compensated
from tests.doubles.tiny_models import model_of, tiny_plan
from was_kernels import sparsify
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.plan_checkpoint import save_with_plan
from was_search.errors import ConfigError, PlanError
from was_search.plan import Plan

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [[5, 60, 7, 33, 12], [90, 4, 17, 2], [8, 9, 10, 11, 12, 13, 14]]
TOKENS = 24


def exported(folder: Path, family: str, masks: Any) -> Path:
    """A checkpoint in float32 that carries a plan; that of shared masks has a compensation."""
    model = model_of(family, "cpu", torch.float32)
    model.save_pretrained(folder / "checkpoint")
    source = resolve_model(str(folder / "checkpoint"))
    plan = tiny_plan(model, masks=masks)
    plan = replace(compensated(plan, 0.1) if masks == "shared" else plan, fingerprint=fingerprint(source))
    return save_with_plan(source, plan, folder / "with plan")


@pytest.fixture(scope="module", params=[("llama", "separate", False), ("qwen2", "shared", True)], ids=lambda p: p[0])
def served(request, tmp_path_factory) -> tuple[Path, Any]:
    """A folder, and vLLM with it: once compiled, once not."""
    from vllm import LLM

    family, masks, eager = request.param
    folder = exported(tmp_path_factory.mktemp(family), family, masks)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    options = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 4, "skip_tokenizer_init": True}
    return folder, LLM(str(folder), enforce_eager=eager, **options)


def decoded(llm: Any, prompts: list[list[int]], tokens: int = TOKENS) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of each prompt, one after another, with their log-probabilities."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False)
    results = []
    for prompt in prompts:
        (found,) = llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
        ids = list(found.outputs[0].token_ids)
        results.append((ids, [each[i].logprob for each, i in zip(found.outputs[0].logprobs, ids, strict=True)]))
    return results


def test_texts_are_those_of_the_decoding_loop(served):
    folder, llm = served
    plan = replace(Plan.load(folder), prefill="dense")
    handle = sparsify(AutoModelForCausalLM.from_pretrained(folder.parent / "checkpoint"), plan)
    for prompt, (ids, _) in zip(PROMPTS, decoded(llm, PROMPTS), strict=True):
        steps = handle.stream(torch.tensor([prompt]), max_new_tokens=TOKENS, eos=[])
        assert ids == [step[0] for step in steps]


def test_prompts_are_dense_and_steps_are_masked(served):
    """One token as well: it lies in the dense prefix."""
    folder, llm = served
    dense = AutoModelForCausalLM.from_pretrained(folder.parent / "checkpoint")
    differences = []
    for prompt in (*PROMPTS, [5]):
        ((ids, chances),) = decoded(llm, [prompt], 6)
        with torch.inference_mode():
            logits = dense(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(6), ids]
        assert abs(float(expected[0]) - chances[0]) < 1e-3
        differences.append(float((expected - torch.tensor(chances))[1:].abs().max()))
    assert min(differences) > 0.01


def test_several_requests_at_once(served):
    from vllm import SamplingParams

    how = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    found = served[1].generate([{"prompt_token_ids": prompt} for prompt in PROMPTS * 3], how, use_tqdm=False)
    assert [len(each.outputs[0].token_ids) for each in found] == [8] * 9


def engine_config(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(folder), dtype="float32", skip_tokenizer_init=True, **options).create_engine_config()


def test_registering_twice_changes_nothing():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from was_kernels.runtime.vllm_method import PlanConfig
    from was_kernels.runtime.vllm_plugin import register

    register()
    register()
    assert QUANTIZATION_METHODS.count("was") == 1
    assert get_quantization_config("was") is PlanConfig


def test_a_damaged_plan_is_refused_before_anything_is_loaded(tmp_path):
    folder = exported(tmp_path, "llama", "separate")
    path = folder / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the plan is truncated"):
        engine_config(folder)
    (folder / "plan.json").unlink()
    with pytest.raises(ValueError, match="a plan is a folder with"):
        engine_config(folder)


def test_another_plan_than_the_configuration_speaks_of_is_refused(tmp_path):
    folder = exported(tmp_path, "llama", "separate")
    replace(Plan.load(folder), fingerprint="e" * 64).save(folder)
    with pytest.raises(ValueError, match="speaks of another plan than the one that lies there"):
        engine_config(folder)


def test_another_quantisation_is_refused_by_vllm(tmp_path):
    with pytest.raises(ValueError, match=r"\(was\) does not match"):
        engine_config(exported(tmp_path, "llama", "separate"), quantization="fp8")


def test_what_vllms_model_holds_must_be_the_plans(tmp_path):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    config = engine_config(exported(tmp_path, "llama", "separate"))
    plan_config = config.quant_config
    again = pickle.loads(pickle.dumps(plan_config))
    assert "plan" not in vars(again) and again.plan.fingerprint == plan_config.plan.fingerprint
    linear = ReplicatedLinear.__new__(ReplicatedLinear)
    with set_current_vllm_config(config):
        method = plan_config.get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")
        with pytest.raises(PlanError, match=r"plan for weights .*, the model has .*another model"):
            method.create_weights(torch.nn.Module(), 8, [8, 8, 8], 8, 24, torch.float32)
        with pytest.raises(PlanError, match="another layer is it already"):
            plan_config.get_quant_method(linear, "model.layers.0.self_attn.q_proj")
        with pytest.raises(PlanError, match="the plan has no such projection"):
            plan_config.get_quant_method(linear, "model.layers.2.mlp.down_proj")
        with pytest.raises(PlanError, match=r"^block 0: vLLM's model has no o projection"):
            plan_config.require_all_claimed()
        config.parallel_config.tensor_parallel_size = 2
        with pytest.raises(ConfigError, match="a plan is not served with tensor parallelism"):
            plan_config.get_quant_method(linear, "model.layers.0.mlp.down_proj")
