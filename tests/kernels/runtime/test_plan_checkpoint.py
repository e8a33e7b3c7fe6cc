"""Checkpoints that carry their plan: dense for whoever does not know us, sparse for transformers where we are there."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

from benchmarks.harness.random_models import compensated
from tests.doubles.random_checkpoint import save_tokenizer
from tests.doubles.tiny_models import masked_logits, tiny_model, tiny_plan
from tests.fresh_python import run_fresh
from was_kernels import SparseModel, load_sparse, sparsify
from was_search.checkpoints.column_layout import save_columns
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model
from was_search.checkpoints.plan_checkpoint import save_with_plan
from was_search.errors import ConfigError, PlanError
from was_search.plan import Plan
from was_search.service.cli.plan import load_plan

TOKENS = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def exported(
    tmp_path: Path, family: str = "llama", *, shard_size: str = "50GB", corrects: bool = False
) -> tuple[Path, Path, Plan]:
    """A checkpoint in float32, the same with a plan, and the plan."""
    original = tmp_path / "checkpoint"
    tiny_model(family, torch.float32).save_pretrained(original, max_shard_size=shard_size)
    save_tokenizer(original)
    source = resolve_model(str(original))
    model = load_model(source, dtype="float32")
    plan = compensated(tiny_plan(model)) if corrects else tiny_plan(model)
    plan = Plan(**{**vars(plan), "fingerprint": fingerprint(source)})
    return original, save_with_plan(source, plan, tmp_path / "with plan"), plan


@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
def test_the_folder_is_the_checkpoint(tmp_path, shard_size):
    original, folder, plan = exported(tmp_path, shard_size=shard_size)
    for path in original.iterdir():
        if path.name != "config.json":
            assert path.read_bytes() == (folder / path.name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "was"
    assert config == json.loads((original / "config.json").read_text())
    source = resolve_model(str(folder))
    assert fingerprint(source) == plan.fingerprint
    model = load_model(source, dtype="float32")
    assert not hasattr(model, "was") and not hasattr(model.config, "quantization_config")
    again = save_with_plan(source, plan, tmp_path / "again")
    assert fingerprint(resolve_model(str(again))) == plan.fingerprint


@pytest.mark.parametrize("corrects", [False, True])
def test_without_us_it_is_dense_with_a_warning(tmp_path, monkeypatch, caplog, corrects):
    original, folder, _ = exported(tmp_path, corrects=corrects)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "was")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "was")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "Unknown quantization type, got was" in caplog.text
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(original)(TOKENS).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_from_pretrained_gives_the_sparse_model(tmp_path, family):
    original, folder, plan = exported(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert isinstance(model.was, SparseModel)
    dense = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float64)
    expected = masked_logits(dense, plan, TOKENS)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    handle = load_sparse(folder, device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False}
    found = AutoModelForCausalLM.from_pretrained(folder).generate(TOKENS[:1], **options)
    assert torch.equal(found, handle.model.generate(TOKENS[:1], **options))
    model.was.restore()
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, dense(TOKENS).logits)


def test_it_is_corrected_where_the_plan_has_a_compensation(tmp_path):
    original, folder, plan = exported(tmp_path, corrects=True)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["schema_version"] == 2
    dense = AutoModelForCausalLM.from_pretrained(original)
    with torch.inference_mode(), sparsify(dense, plan) as sparse:
        expected = sparse(TOKENS).logits
    source = resolve_model(str(original))
    columns = save_columns(load_model(source, dtype="float32"), plan, source, tmp_path / "columns")
    with torch.inference_mode():
        for model in (
            AutoModelForCausalLM.from_pretrained(folder),
            load_sparse(folder, device="cpu").model,
            load_sparse(columns, device="cpu").model,
        ):
            assert torch.equal(model(TOKENS).logits, expected)
        torch.testing.assert_close(masked_logits(dense, plan, TOKENS), expected, rtol=1e-3, atol=1e-3)
    moved = AutoModelForCausalLM.from_pretrained(folder).to(torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(moved(TOKENS).logits.float(), expected, rtol=1e-3, atol=1e-3)


def test_it_is_cast_and_moved_like_any_model(tmp_path):
    original, folder, plan = exported(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    handle = sparsify(AutoModelForCausalLM.from_pretrained(original).to(torch.bfloat16), plan)
    assert model.was.projections[0].weight.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, handle.model(TOKENS).logits)
        counts = []
        for each in (model.was, handle):
            with each.counting() as count:
                each.model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False)
            counts.append(count.sparsity())
    assert counts[0] == counts[1] > 0.3
    assert type(model).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="serializable"):
        model.save_pretrained(folder / "elsewhere")


@pytest.mark.gpu
def test_it_is_moved_to_a_gpu(tmp_path, cuda):
    _, folder, _ = exported(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(cuda)
    assert model.was.backend in ("cuda", "triton")
    text = model.generate(TOKENS[:1].to(cuda), max_new_tokens=8, do_sample=False)
    assert text.is_cuda and text.shape == (1, 17)


@pytest.mark.parametrize("first", ["was_kernels", "transformers.quantizers.auto"])
def test_it_is_registered_whichever_is_imported_first(first):
    code = f"""
import sys, {first}
if {first!r} == "was_kernels":
    assert "transformers" not in sys.modules, "transformers is not imported for that"
import was_kernels, transformers.quantizers.auto as auto
assert "was" in auto.AUTO_QUANTIZER_MAPPING and "was" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers import AutoModelForCausalLM
"""
    run = run_fresh(code)
    assert run.returncode == 0, run.stderr


def changed(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


def without_plan(folder: Path) -> None:
    (folder / "plan.json").unlink()


def truncated(folder: Path) -> None:
    path = folder / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def of_another_model(folder: Path) -> None:
    plan = Plan.load(folder)
    Plan(**{**vars(plan), "fingerprint": "e" * 64}).save(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_plan, "a plan is a folder with"),
        (truncated, "the plan is truncated"),
        (of_another_model, r"speaks of another plan than the one that lies there \(plan_sha256\)"),
        (lambda folder: changed(folder, masks="shared"), r"speaks of another plan .*\(masks\)"),
        (lambda folder: changed(folder, schema_version=None), r"another plan .*\(schema_version\)"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_every_reader(tmp_path, damage, message):
    _, folder, _ = exported(tmp_path)
    damage(folder)
    for read in (AutoModelForCausalLM.from_pretrained, load_sparse, load_plan):
        with pytest.raises(PlanError, match=message):
            read(folder)


def test_weights_that_are_not_the_plans_are_refused(tmp_path):
    _, folder, plan = exported(tmp_path)
    tiny_model("llama", torch.float32, seed=1).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(PlanError, match="belongs to another model"):
        load_sparse(folder, device="cpu")
    loaded, settings = load_plan(folder)
    assert settings.model == str(folder) and loaded.fingerprint == plan.fingerprint


def test_what_cannot_be_exported(tmp_path):
    original, _, plan = exported(tmp_path)
    source = resolve_model(str(original))
    with pytest.raises(ConfigError, match="is the checkpoint's own folder"):
        save_with_plan(source, plan, original)
    changed_config = json.loads((original / "config.json").read_text()) | {"quantization_config": {"quant_method": "x"}}
    (original / "config.json").write_text(json.dumps(changed_config))
    with pytest.raises(ConfigError, match="is quantised, whose weights cannot be exported"):
        save_with_plan(source, plan, tmp_path / "third")


def test_an_export_that_broke_off_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    original, folder, plan = exported(tmp_path)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(PlanError, match=r"cannot write .* \(No space left on device"):
        save_with_plan(resolve_model(str(original)), plan, folder)
    assert not (folder / "config.json").exists()


@pytest.mark.slow
def test_lm_evals_own_model_runs_the_plan(tmp_path):
    from lm_eval.models.huggingface import HFLM

    original, folder, plan = exported(tmp_path, corrects=True)
    evaluated = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    assert isinstance(evaluated.model.was, SparseModel)
    ids = [5, 60, 7, 33, 12, 90, 4]
    dense = AutoModelForCausalLM.from_pretrained(original)
    ((found, _),) = evaluated._loglikelihood_tokens([(("a", "b"), ids[:1], ids[1:])])
    for logits, close in (
        (masked_logits(dense, plan, torch.tensor([ids])), True),
        (masked_logits(dense, replace(plan, compensation=None), torch.tensor([ids])), False),
        (dense(torch.tensor([ids])).logits, False),
    ):
        chances = logits.log_softmax(-1)[0]
        expected = sum(float(chances[i, token]) for i, token in enumerate(ids[1:]))
        assert (abs(found - expected) < 1e-3) == close
