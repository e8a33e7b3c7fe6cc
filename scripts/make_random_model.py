"""Write a Llama checkpoint of a named shape with random weights, to measure speed and memory on.

`python scripts/make_random_model.py llama-2-7b FOLDER --device cuda` writes bf16 safetensors in shards, a
configuration and a tokenizer: the one of --tokenizer, else one token a byte. Nothing is fetched.

Weights are drawn so that activations stay near unit size at any depth: standard deviation 1/sqrt(inputs), divided by
sqrt(2 L) for the two projections of a block that write to the residual stream; embeddings 1; norms 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from was_search.checkpoints.files import ModelSource

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": 0,
    },
}
"""Arguments of LlamaConfig by shape; the vocabulary is raised to the tokenizer's where that is larger."""

SHARD_BYTES = 4 * 10**9


def make_random_model(
    folder: Path,
    shape: str,
    *,
    tokenizer: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the checkpoint into ``folder`` (made if missing; files of the same names are replaced).

    Deterministic for a seed on one kind of device and torch version.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        byte_tokenizer().save_pretrained(folder)
    else:
        for path in ModelSource(str(tokenizer), tokenizer.name, tokenizer, "").tokenizer_files():
            shutil.copy(path, folder / path.name)
    loaded = AutoTokenizer.from_pretrained(folder)
    values = {**SHAPES[shape], "vocab_size": max(SHAPES[shape]["vocab_size"], len(loaded))}
    config = LlamaConfig(
        **values,
        bos_token_id=loaded.bos_token_id,
        eos_token_id=loaded.eos_token_id,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    write_shards(folder, outline, config.num_hidden_layers, device, seed, shard_bytes)
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer of 258 ids: BOS (which it adds to a text), EOS and the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *characters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def write_shards(
    folder: Path, outline: dict[str, Tensor], n_blocks: int, device: str, seed: int, shard_bytes: int
) -> None:
    """Draw the tensors of ``outline`` (names and shapes) one shard at a time and save them."""
    from safetensors.torch import save_file

    plans: list[list[str]] = [[]]
    size = 0
    for name, tensor in outline.items():
        if size and size + tensor.nbytes > shard_bytes:
            plans.append([])
            size = 0
        plans[-1].append(name)
        size += tensor.nbytes
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    generator = torch.Generator(device).manual_seed(seed)
    files: dict[str, str] = {}
    for i, names in enumerate(plans):
        file = "model.safetensors" if len(plans) == 1 else f"model-{i + 1:05d}-of-{len(plans):05d}.safetensors"
        tensors = {name: draw(name, outline[name], n_blocks, generator).cpu() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(plans) > 1:
        total = sum(tensor.nbytes for tensor in outline.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def draw(name: str, outline: Tensor, n_blocks: int, generator: torch.Generator) -> Tensor:
    """One tensor of the shape and dtype of ``outline``, on the generator's device."""
    options = {"dtype": outline.dtype, "device": generator.device}
    if outline.ndim < 2:
        return (torch.zeros if name.endswith("bias") else torch.ones)(outline.shape, **options)
    std = 1.0 if "embed_tokens" in name else outline.shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std *= (2 * n_blocks) ** -0.5
    return torch.empty(outline.shape, **options).normal_(0.0, std, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder to copy the tokenizer from")
    parser.add_argument("--device", default="cpu", help="where weights are drawn: cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    folder = make_random_model(
        arguments.folder,
        arguments.shape,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        seed=arguments.seed,
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
