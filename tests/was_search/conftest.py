"""Tiny random models and tokens for the tests of the core: seconds on one core, offline."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from was_search.checkpoints.structure import Structure, find_structure
from was_search.masks.masked_model import MaskedModel
from was_search.shape import IntArray
from was_search.texts.protocol import EvaluationProtocol, TokenSet

torch.set_num_threads(1)

VOCABULARY = 61
"""Odd on purpose: nothing may rely on a round size."""


def build_llama(dtype: torch.dtype = torch.float32, n_blocks: int = 3, seed: int = 0) -> nn.Module:
    """Three blocks, 4 heads on 2 key-value heads, widths 16 and 24; weights so large that masks matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=n_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., nn.Module]:
    return build_llama


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    """A frozen float32 model; tests must leave it as they found it."""
    return build_llama()


@pytest.fixture(scope="session")
def structure(llama: nn.Module) -> Structure:
    return find_structure(llama)


@pytest.fixture(scope="session")
def masked(llama: nn.Module) -> MaskedModel:
    """The same model as the passes take it, scores weighed by l2 norms."""
    return MaskedModel.of(llama, "l2")


@pytest.fixture(scope="session")
def tokens() -> IntArray:
    """[10, 17]: neither a multiple of the batch sizes used."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (10, 17))


@pytest.fixture(scope="session")
def make_data() -> Callable[..., TokenSet]:
    def make(tokens: IntArray, **changes: object) -> TokenSet:
        values = {
            "data": "random.txt",
            "data_hash": "ab" * 32,
            "split": "search",
            "sequence_length": tokens.shape[1],
            "stride": tokens.shape[1],
            "n_sequences": len(tokens),
            "bos": False,
            "dtype": "float32",
            "batch_size": 4,
            "dense_prefix": 1,
        }
        return TokenSet(EvaluationProtocol(**{**values, **changes}), tokens)

    return make
