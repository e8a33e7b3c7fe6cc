"""Loading tiny checkpoints of several families, and what is refused before any weight is used."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from was_search.checkpoints import load as model_module
from was_search.checkpoints.load import load_model, load_tokenizer, pick_device, pick_dtype, resolve_model
from was_search.checkpoints.structure import find_structure
from was_search.errors import ConfigError, ModelError, ResourceError

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def script():
    path = Path(__file__).parents[3] / "scripts" / "make_random_model.py"
    spec = importlib.util.spec_from_file_location("make_random_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return script().make_random_model(tmp_path_factory.mktemp("made") / "tiny", "tiny")


@pytest.fixture
def folder(tmp_path):
    """A Llama with its head, saved by transformers."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_loaded_model_is_frozen_and_the_same_as_saved(folder):
    model = load_model(resolve_model(str(folder)), dtype="float32")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dtypes(folder, dtype):
    model = load_model(str(folder), dtype=dtype, device="cpu")
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families_with_tied_and_untied_heads(family, tmp_path):
    for tied in (False, True):
        config = AutoConfig.for_model(family, **SIZES, head_dim=8, tie_word_embeddings=tied)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(tied))
        model = load_model(str(tmp_path / str(tied)), dtype="float32")
        assert find_structure(model).shape.n_blocks == 2


def test_a_device_map_places_the_model(folder):
    model = load_model(str(folder), dtype="float32", device_map={"": "cpu"})
    with torch.inference_mode():
        expected = load_model(str(folder), dtype="float32")(torch.arange(5)[None]).logits
        assert torch.equal(model(torch.arange(5)[None]).logits, expected)


def test_a_device_map_needs_accelerate(folder, monkeypatch):
    monkeypatch.setattr(model_module, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"needs the package accelerate, .*; pip install 'accelerate>=1\.1'"):
        load_model(str(folder), dtype="float32", device_map="auto")


def test_accelerate_comes_with_the_package():
    """Otherwise --gpus-per-worker 2 ends on the first worker."""
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert any(re.match(r"accelerate\b", wanted) for wanted in tomllib.loads(text)["project"]["dependencies"])


@pytest.mark.parametrize(
    ("gpus", "device", "error", "words"),
    [
        (0, "cpu", ConfigError, "gpus: must be at least 1, got 0"),
        (2, "cpu", ConfigError, "gpus: must be 1 with --device cpu, got 2"),
        (2, "cuda:1", ConfigError, "gpus: must be 1 with --device cuda:1, got 2"),
        (4, "cuda", ResourceError, "gpus: 4 were asked for and this process sees 3"),
    ],
)
def test_a_number_of_gpus_that_cannot_be(folder, monkeypatch, gpus, device, error, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(error, match=words):
        load_model(str(folder), dtype="float32", device=device, gpus=gpus)


def test_a_model_is_spread_over_the_first_gpus_and_leaves_them_room(folder, monkeypatch):
    """What transformers is asked for; the model itself then lies on the CPU, with accelerate's hooks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 * (gpu + 1), 8000))
    asked = {}
    ordinary = transformers.AutoModelForCausalLM.from_pretrained

    def instead(*args, **kwargs):
        asked.update(kwargs)
        del kwargs["max_memory"]
        return ordinary(*args, **{**kwargs, "device_map": {"": "cpu"}})

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", instead)
    model = load_model(str(folder), dtype="float32", device="auto", gpus=2)
    assert (asked["device_map"], asked["max_memory"]) == ("balanced", {0: 900, 1: 1800})
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_loading_leaves_the_progress_bars_as_they_were(folder, capfd):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_model(str(folder), dtype="float32")
    assert logging.is_progress_bar_enabled() is before
    assert "Loading" not in capfd.readouterr().err


def test_a_tokenizer_is_loaded(made):
    for source in (str(made), resolve_model(str(made))):
        tokenizer = load_tokenizer(source)
        ids = tokenizer("def f(é):\n")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "def f(é):\n"


def test_no_tokenizer(folder):
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("values", [{"num_attention_heads": 0}, {"num_hidden_layers": 2.0}, {"rms_norm_eps": "x"}])
def test_a_configuration_that_is_none_is_not_the_tokenizers_fault(made, tmp_path, values):
    """The tokenizer's loading reads it too, and comes first."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, **values)
    with pytest.raises(ModelError, match=r"config\.json is not valid \("):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ({"num_hidden_layers": 1}, r"9 weights of its blocks, such as model\.layers\.1\.input_layernorm\.weight"),
        ({}, r"2 weights of its blocks, such as model\.layers\.0\.self_attn\.k_norm\.weight"),
    ],
)
def test_blocks_or_parts_of_them_that_a_configuration_leaves_out(folder, values, left_out):
    """Before, half of the layers were measured as if they were the model."""
    change_config(folder, **values)
    if not values:
        path = folder / "model.safetensors"
        more = {f"model.layers.0.self_attn.{name}": torch.ones(8) for name in ("q_norm.weight", "k_norm.weight")}
        save_file({**load_file(path), **more}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"its configuration has no place for {left_out}; config\.json is another"):
        load_model(str(folder), dtype="float32")


def test_what_lies_beside_the_blocks_is_left_out(folder):
    """A second head, another tower, what old releases stored of rotary embeddings."""
    path = folder / "model.safetensors"
    names = ("mtp.weight", "vision_tower.layers.0.q_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    save_file({**load_file(path), **{name: torch.ones(4) for name in names}}, path, {"format": "pt"})
    assert load_model(str(folder), dtype="float32").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_key_value_heads": 1}, r"k_proj\.weight as \(8, 32\), the files hold \(16, 32\)"),
        ({"vocab_size": 68}, r"(lm_head|embed_tokens)\.weight as \(68, 32\), the files hold \(67, 32\)"),
    ],
)
def test_weights_of_another_shape_are_named(folder, values, words):
    change_config(folder, **values)
    with pytest.raises(ModelError, match=rf"\(config\.json describes .*{words}\)"):
        load_model(str(folder), dtype="float32")


def test_a_model_that_needs_code_of_its_own(folder, tmp_path):
    change_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"\(model_type 'own'\) needs code of its own, which is never run"):
        load_model(str(folder), dtype="float32")
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_known_architecture_is_not_run(folder, tmp_path):
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert isinstance(load_model(str(folder), dtype="float32"), LlamaForCausalLM)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architecture(folder):
    change_config(folder, model_type="llama99")
    with pytest.raises(ModelError, match=rf"transformers {transformers.__version__} knows no model_type 'llama99'"):
        load_model(str(folder), dtype="float32")


@pytest.mark.parametrize("kind", ["t5", "vit", "bart"])
def test_no_causal_language_model(folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=f"is a {kind} model, not a causal language model"):
        load_model(str(folder), dtype="float32")


def test_an_invalid_configuration(folder):
    change_config(folder, num_hidden_layers="two")
    with pytest.raises(ModelError, match=r"config\.json is not valid|cannot be loaded as a causal language model"):
        load_model(str(folder), dtype="float32")


def test_missing_weights_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 2 weights of a LlamaForCausalLM, such as lm_head\.weight; not a whole"
    ):
        load_model(str(folder), dtype="float32")


def test_weights_of_another_shape(folder):
    change_config(folder, intermediate_size=50)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(str(folder), dtype="float32")


def test_out_of_memory_stays_what_it_is(folder, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(str(folder), dtype="float32")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_devices_without_a_gpu(no_gpu, folder):
    assert (pick_device("auto"), pick_device("cpu")) == ("cpu", "cpu")
    for asked in ("cuda", "cuda:0"):
        with pytest.raises(
            ResourceError, match=rf"device: {asked} was asked for and no GPU was found; use --device cpu"
        ):
            load_model(str(folder), device=asked)


def test_devices_with_two_gpus(two_gpus):
    assert [pick_device(asked) for asked in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ResourceError, match="device: cuda:2 was asked for and only 2 found"):
        pick_device("cuda:2")


@pytest.mark.parametrize("asked", ["gpu", "", "cuda:", "cuda:x", "mps"])
def test_unknown_devices(asked):
    with pytest.raises(ConfigError, match=f"device: must be auto, cpu, cuda or cuda:N, got '{asked}'"):
        pick_device(asked)


def test_dtype_names(folder):
    assert [pick_dtype("auto", device) for device in ("cpu", "cuda", "cuda:1")] == ["float32", "bfloat16", "bfloat16"]
    assert pick_dtype("float16", "cpu") == "float16"
    with pytest.raises(ConfigError, match="dtype: must be one of auto, float32, bfloat16, float16, got 'int8'"):
        load_model(str(folder), dtype="int8")
