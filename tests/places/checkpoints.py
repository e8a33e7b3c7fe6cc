"""Folders of checkpoints as people have them, on one tiny Llama with a token for each byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.places.tokenizers import with_template

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TINY: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_llama(seed: int = 0, **config: Any) -> Any:
    """A random model of two blocks, float32, whose weights are large enough for its tokens to differ."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **config})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(torch.randn_like(weight) * 0.2)
    return model


def checkpoint(folder: Path, *, tokenizer: Any = None, seed: int = 0, **config: Any) -> Path:
    """A whole checkpoint with a tokenizer, that of bytes without BOS if none is given."""
    tiny_llama(seed, **config).save_pretrained(folder)
    (tokenizer or with_template("$A", bos=None)).save_pretrained(folder)
    return folder


READ: dict[str, Callable[[Path], Path]] = {}
"""Folders with weights of two sorts beside each other, or named otherwise: what transformers loads counts."""

REFUSED: dict[str, tuple[str, Callable[[Path], Path]]] = {}
"""Folders that are refused: a part of the message as a regular expression, and how they are made."""


def _read(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    READ[build.__name__] = build
    return build


def _refused(message: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def add(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        REFUSED[build.__name__] = (message, build)
        return build

    return add


def configure(folder: Path, **values: Any) -> Path:
    """Change values of the folder's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def _shards(folder: Path, seed: int, index: str = INDEX) -> None:
    """Two shards with an index, of another model."""
    weights = dict(tiny_llama(seed).state_dict())
    names = sorted(weights)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@_read
def one_file(folder: Path) -> Path:
    return checkpoint(folder)


@_read
def shards(folder: Path) -> Path:
    checkpoint(folder)
    (folder / WEIGHTS).unlink()
    _shards(folder, 1)
    return folder


@_read
def one_file_beside_shards_of_others(folder: Path) -> Path:
    checkpoint(folder)
    _shards(folder, 1)
    return folder


@_read
def one_file_beside_an_index_that_is_damaged(folder: Path) -> Path:
    checkpoint(folder)
    (folder / INDEX).write_text("{")
    return folder


@_read
def a_variant_beside(folder: Path) -> Path:
    checkpoint(folder)
    save_file(dict(tiny_llama(1).state_dict()), folder / "model.fp16.safetensors", {"format": "pt"})
    return folder


@_read
def pickled_weights_beside(folder: Path) -> Path:
    checkpoint(folder)
    torch.save(tiny_llama(1).state_dict(), folder / "pytorch_model.bin")
    return folder


@_read
def weights_that_the_configuration_names(folder: Path) -> Path:
    checkpoint(folder)
    save_file(dict(tiny_llama(1).state_dict()), folder / "other.safetensors", {"format": "pt"})
    return configure(folder, transformers_weights="other.safetensors")


@_read
def an_index_that_the_configuration_names(folder: Path) -> Path:
    checkpoint(folder)
    _shards(folder, 1, "other.safetensors.index.json")
    return configure(folder, transformers_weights="other.safetensors.index.json")


@_read
def shards_that_hold_a_tensor_twice(folder: Path) -> Path:
    shards(folder)
    first, second = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    weights, others = load_file(first), load_file(second)
    name = next(name for name in weights if weights[name].dim() == 2)
    save_file({**others, name: weights[name] + 1.0}, second, {"format": "pt"})
    return folder


@_read
def another_configuration_for_this_release(folder: Path) -> Path:
    checkpoint(folder)
    own = {**json.loads((folder / "config.json").read_text()), "rms_norm_eps": 0.5}
    (folder / "config.4.0.0.json").write_text(json.dumps(own))
    return configure(folder, configuration_files=["config.4.0.0.json", "config.99.0.0.json"])


@_refused(r"distributed training \(shard-00000-model-00001-of-00001\.safetensors\), which is read in place of")
def distributed_training(folder: Path) -> Path:
    checkpoint(folder)
    name = "shard-00000-model-00001-of-00001.safetensors"
    save_file(dict(tiny_llama(1).state_dict()), folder / name, {"format": "pt"})
    return folder


@_refused(r"has no weights .*model\.fp16\.safetensors is a variant, which is read by no default")
def only_a_variant(folder: Path) -> Path:
    checkpoint(folder)
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    return folder


@_refused(r"has no weights .*; pytorch_model\.bin is pickled, which is never loaded")
def only_pickled_weights(folder: Path) -> Path:
    checkpoint(folder)
    torch.save(tiny_llama(1).state_dict(), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


@_refused(r"has no weights .*; model-q4\.gguf is GGUF: give that file")
def only_gguf(folder: Path) -> Path:
    checkpoint(folder)
    (folder / WEIGHTS).rename(folder / "model-q4.gguf")
    return folder


@_refused(r"has no weights .*; there are some in .*/inner")
def weights_in_a_subfolder(folder: Path) -> Path:
    checkpoint(folder)
    (folder / "inner").mkdir()
    (folder / WEIGHTS).rename(folder / "inner" / WEIGHTS)
    return folder


@_refused(r"has no config\.json; give .*/inner, which has one")
def checkpoint_in_a_subfolder(folder: Path) -> Path:
    checkpoint(folder / "inner")
    return folder


@_refused(r"holds an adapter beside a model; merge it into the model first")
def an_adapter_beside(folder: Path) -> Path:
    checkpoint(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other"}')
    return folder


@_refused(r"other\.safetensors is missing, though config\.json names it")
def named_weights_that_are_not_there(folder: Path) -> Path:
    return configure(checkpoint(folder), transformers_weights="other.safetensors")


@_refused(r"transformers_weights must name a safetensors file or index of the folder, got '\.\./model\.safetensors'")
def named_weights_outside(folder: Path) -> Path:
    return configure(checkpoint(folder), transformers_weights="../model.safetensors")


@_refused(r"model-00002-of-00002\.safetensors is missing, though model\.safetensors\.index\.json names it")
def a_shard_is_missing(folder: Path) -> Path:
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


@_refused(r"configuration_files must name files config\.VERSION\.json of the folder")
def a_configuration_outside(folder: Path) -> Path:
    return configure(checkpoint(folder), configuration_files=["../config.4.0.0.json"])


@_refused(r'index\.json has no "metadata", which transformers asks for; add "metadata": \{\} to it')
def an_index_without_metadata(folder: Path) -> Path:
    shards(folder)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    return folder
