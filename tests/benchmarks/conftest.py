"""A tiny random model, and ledgers and tasks on the synthetic problem."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.ledger import Ledger
from benchmarks.harness.methods import Task
from tests.benchmarks.bowl import N_SEQUENCES, SHAPE, TARGET, TOKENS, Bowl, seeds
from was_search.texts.protocol import EvaluationProtocol, TokenSet


@pytest.fixture
def bowl() -> Bowl:
    return Bowl()


@pytest.fixture
def new_ledger(bowl: Bowl) -> Callable[..., Ledger]:
    """A ledger on the bowl with a budget of ``evaluations``."""

    def make(evaluations: float, **options) -> Ledger:
        return Ledger(
            bowl.losses,
            SHAPE,
            TARGET,
            n_sequences=N_SEQUENCES,
            tokens_per_sequence=TOKENS,
            evaluations=evaluations,
            **options,
        )

    return make


@pytest.fixture
def task() -> Callable[..., Task]:
    def make(space: str = "levels", seed: int = 0, radius: float = 0.1) -> Task:
        return Task(SHAPE, TARGET, seeds(), space, radius, seed)

    return make


@pytest.fixture
def make_llama() -> Callable[..., nn.Module]:
    """Three blocks with grouped queries and odd widths; weights so large that masks matter."""

    def make(**changes) -> nn.Module:
        torch.manual_seed(0)
        values = {
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.25,
            "max_position_embeddings": 64,
        }
        return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval().requires_grad_(False)

    return make


@pytest.fixture
def token_set() -> TokenSet:
    """75 sequences of 17 tokens: a chunk of 64, one of 8, and 3 left over."""
    tokens = np.random.default_rng(0).integers(0, 61, (75, 17))
    protocol = EvaluationProtocol("random.txt", "ab" * 32, "search", 17, 17, 75, False, "float32", 8, 2)
    return TokenSet.of(protocol, tokens)
