"""What is fingerprinted, measured and checked for damage are the very files that are loaded: those of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.places.checkpoints import INDEX, READ, REFUSED, WEIGHTS, checkpoint, configure, tiny_llama
from tests.places.tokenizers import with_template
from was_search.checkpoints.empty_model import empty_model
from was_search.checkpoints.files import read_config, resolve_model
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model
from was_search.errors import ModelError


def same_weights(ours, theirs):
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(name == other and torch.equal(weight, weights) for (name, weight), (other, weights) in pairs)


@pytest.mark.parametrize("place", READ)
def test_the_model_is_the_one_that_transformers_loads(place, tmp_path):
    folder = READ[place](tmp_path)
    ours = load_model(str(folder), dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert same_weights(ours, theirs)
    assert ours.config.rms_norm_eps == theirs.config.rms_norm_eps
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("place", READ)
def test_the_fingerprint_follows_what_is_loaded_and_nothing_else(place, tmp_path):
    folder = READ[place](tmp_path)
    source = resolve_model(str(folder))
    loaded = set(source.weight_files())
    before = fingerprint(source)
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        weights = load_file(path)
        save_file({name: weight + 1.0 for name, weight in weights.items()}, path, {"format": "pt"})
        assert (fingerprint(source) != before) is (path in loaded)
        path.write_bytes(content)
    assert fingerprint(source) == before


@pytest.mark.parametrize("place", READ)
def test_damage_is_found_in_what_is_loaded_and_nothing_else(place, tmp_path):
    folder = READ[place](tmp_path)
    loaded = resolve_model(str(folder)).weight_files()
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        if path in loaded:
            with pytest.raises(ModelError, match=rf"{path.name} is damaged or truncated"):
                resolve_model(str(folder))
        else:
            assert resolve_model(str(folder)).weight_files() == loaded
        path.write_bytes(content)


@pytest.mark.parametrize("place", REFUSED)
def test_what_cannot_be_read_as_transformers_reads_it_is_refused(place, tmp_path):
    message, build = REFUSED[place]
    folder = build(tmp_path)
    with pytest.raises(ModelError, match=message):
        empty_model(resolve_model(str(folder)))


def test_sizes_are_those_of_the_files_that_are_loaded(tmp_path):
    """Shards of a larger model beside the file would let the configuration pass for the larger one."""
    checkpoint(tmp_path)
    larger = dict(tiny_llama(num_hidden_layers=6).state_dict())
    save_file(larger, tmp_path / "model-1.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(larger, "model-1.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    configure(tmp_path, num_hidden_layers=6)
    with pytest.raises(ModelError, match=r"the configuration describes .* weights, the files hold"):
        load_model(str(tmp_path), dtype="float32")


def test_a_loaded_model_is_saved_as_others_are(tmp_path):
    model = load_model(str(READ["weights_that_the_configuration_names"](tmp_path / "a")), dtype="float32")
    model.save_pretrained(tmp_path / "b")
    assert "transformers_weights" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert same_weights(model, load_model(str(tmp_path / "b"), dtype="float32"))


def test_the_fingerprint_of_an_ordinary_folder_is_what_it_was(tmp_path):
    """Caches, studies and plans of before are found again: sha256 of the configuration, then of names and hashes."""
    import hashlib

    folder = checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    inner = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    whole = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + WEIGHTS.encode() + b"\0" + inner.encode())
    assert fingerprint(resolve_model(str(folder))) == whole.hexdigest()


def test_the_configuration_of_this_release_is_the_one_that_counts(tmp_path):
    source = resolve_model(str(READ["another_configuration_for_this_release"](tmp_path)))
    assert read_config(source)["rms_norm_eps"] == 0.5
    before = fingerprint(source)
    configure(tmp_path, rms_norm_eps=0.25)
    assert fingerprint(source) == before
    (tmp_path / "config.4.0.0.json").write_text(json.dumps({**read_config(source), "rms_norm_eps": 0.75}))
    assert fingerprint(source) != before


@pytest.mark.parametrize("name", ["tokenizer.4.0.0.json", "spiece.model", "qwen.tiktoken", "vocab.bpe"])
def test_every_file_that_a_tokenizer_may_read_counts_for_its_ids(name, tmp_path):
    folder = checkpoint(tmp_path, tokenizer=with_template("$A"))
    before = resolve_model(str(folder)).tokenizer_hash()
    (folder / name).write_text("{}")
    assert resolve_model(str(folder)).tokenizer_hash() != before


def test_other_files_do_not_count_for_token_ids(tmp_path):
    folder = checkpoint(tmp_path)
    before = resolve_model(str(folder)).tokenizer_hash()
    for name in ("README.md", "generation_config.json", INDEX, "training_args.bin"):
        (folder / name).write_text("{}")
    configure(folder, rms_norm_eps=0.5)
    assert resolve_model(str(folder)).tokenizer_hash() == before
    configure(folder, tokenizer_class="OtherTokenizer")
    assert resolve_model(str(folder)).tokenizer_hash() != before
