"""The random checkpoints: complete, of bounded activations at any depth, and the same for a seed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from was_search.checkpoints.load import load_model, load_tokenizer, resolve_model
from was_search.checkpoints.structure import find_structure
from was_search.texts.tokens import beginning

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("make_random_model")


def test_it_loads_like_any_checkpoint(script, tmp_path):
    model = load_model(str(script.make_random_model(tmp_path, "tiny")), dtype="auto")
    shape = find_structure(model).shape
    assert shape.in_features[0] == (32, 32, 32, 32, 32, 32, 80)
    assert shape.out_features[1] == (32, 16, 16, 32, 80, 80, 32)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_shards_hold_what_one_file_does(script, tmp_path):
    whole = script.make_random_model(tmp_path / "whole", "tiny")
    parts = script.make_random_model(tmp_path / "parts", "tiny", shard_bytes=20_000)
    files = resolve_model(str(parts)).weight_files()
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in files)
    expected = load_file(whole / "model.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    script.make_random_model(parts, "tiny")  # again, in one file: no old shard is left
    assert [file.name for file in resolve_model(str(parts)).weight_files()] == ["model.safetensors"]


def test_the_seed_decides(script, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.make_random_model(tmp_path / name, "tiny", seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("depth", [2, 48])
def test_activations_neither_vanish_nor_explode(script, tmp_path, monkeypatch, depth):
    monkeypatch.setitem(script.SHAPES, "deep", {**script.SHAPES["tiny"], "num_hidden_layers": depth})
    model = load_model(str(script.make_random_model(tmp_path, "deep")), dtype="float32")
    tokens = torch.randint(0, 258, (4, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(tokens, output_hidden_states=True)
    sizes = [float(state.std()) for state in output.hidden_states]
    assert all(0.7 < size < 1.6 for size in sizes)
    assert 0.7 < float(output.logits.std()) < 1.4


def test_the_tokenizer_is_one_token_a_byte(script, tmp_path):
    tokenizer = load_tokenizer(str(script.make_random_model(tmp_path, "tiny")))
    text = "def f(é):\n\treturn  '\x00'\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert beginning(tokenizer) == (tokenizer.bos_token_id,)
    assert len(tokenizer) == 258


def test_a_given_tokenizer_is_copied_and_the_vocabulary_fits_it(script, tmp_path):
    demo = Path(__file__).resolve().parents[2] / "was_search" / "demo_data" / "model"
    folder = script.make_random_model(tmp_path, "tiny", tokenizer=demo)
    source = resolve_model(str(folder))
    assert source.tokenizer_hash() == resolve_model(str(demo)).tokenizer_hash()
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype="float32")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.bos_token_id == tokenizer.bos_token_id


def test_the_7b_shape_has_llamas_parameters(script):
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**script.SHAPES["llama-2-7b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
