"""Folders of checkpoints as people have them, on one tiny Llama with a token for each byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.places.tokenizers import with_template

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
