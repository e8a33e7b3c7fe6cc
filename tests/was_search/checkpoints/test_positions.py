"""Scaled positions: what transformers runs is run, in every spelling; longer texts than a model is made for are not."""

from __future__ import annotations

import json

import pytest
import torch

from tests.places.checkpoints import checkpoint, configure
from was_search.checkpoints.load import load_model
from was_search.checkpoints.positions import most_positions
from was_search.errors import ConfigError
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.token_sets import tokens_here

DIM = 8
FACTORS = [1.0 + i / 10 for i in range(DIM)]
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn with its original length": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 4.0, "short_factor": FACTORS, "long_factor": FACTORS},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


def spelt(kind, spelling):
    values = dict(SCALINGS[kind])
    name = values.pop("rope_type", kind)
    if spelling == "new":
        return {"rope_parameters": {"rope_type": name, "rope_theta": 10000.0, **values}}
    return {"rope_scaling": {"rope_type" if spelling == "old" else "type": name, **values}, "rope_parameters": None}


@pytest.mark.parametrize("spelling", ["new", "old", "oldest"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_lengths_up_to_the_scaled_one_are_run_as_by_transformers(kind, spelling, tmp_path):
    folder = checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **spelt(kind, spelling)}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    assert most_positions(config) == 256
    with torch.inference_mode():
        logits = load_model(str(folder), dtype="float32")(torch.arange(256)[None]).logits
    assert logits.isfinite().all()
    (folder / "text.txt").write_text("some words in a line\n" * 200)
    options = {"model": str(folder), "data": str(folder / "text.txt"), "device": "cpu"}
    with Context(Settings(**options, sequence_length=256)) as context:
        context.model.require_positions(256)
        assert tokens_here(context, "test").tokens.shape[1] == 256
        with pytest.raises(ConfigError, match="must be at most the model's 256 positions, got 257"):
            context.model.require_positions(257)


@pytest.mark.parametrize(
    ("config", "room"),
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": None}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "default", "factor": 4.0}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "mrope", "mrope_section": [1]}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": "4"}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": float("nan")}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": float("inf")}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 0.5}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
        # Llama 3.2: the length after scaling is given, and the factor would say more.
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        # Phi-3 with 128k: the original length stands beside, and there is no factor.
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]},
            },
            131072,
        ),
        # DeepSeek-V2: both are given and agree.
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        ({"text_config": {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 4.0}}}, 256),
        ({"max_position_embeddings": 9, "text_config": {"max_position_embeddings": 64}}, 64),
        (
            {
                "text_config": {
                    "max_position_embeddings": 64,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "factor": 8.0},
                        "sliding_attention": {"rope_type": "default"},
                    },
                }
            },
            64,
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "factor": 8.0},
                    "sliding_attention": {"rope_type": "yarn", "factor": 4.0},
                },
            },
            256,
        ),
    ],
)
def test_spellings(config, room):
    assert most_positions(config) == room


def test_a_prompt_may_be_as_long(tmp_path):
    from was_search.service.steps.decoding import generate

    folder = configure(checkpoint(tmp_path), rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})
    with Context(Settings(model=str(folder), device="cpu", dtype="float32")) as context:
        assert generate(context, None, "a" * 100, max_new_tokens=3).tokens == 3
        with pytest.raises(ConfigError, match="254 tokens and 3 new ones exceed the model's 256 positions"):
            generate(context, None, "a" * 254, max_new_tokens=3)
