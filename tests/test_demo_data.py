"""The packaged demo: the checkpoint has the shape and loss promised, the texts are disjoint and as listed."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parent.parent / "was_search" / "demo_data"
MODEL, TEXT = DEMO / "model", DEMO / "text"
TEXTS = ("calibration", "search", "test")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_everything_together_is_at_most_6_mb():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 6_000_000


def test_the_texts_are_those_of_sources_json():
    sources = json.loads((TEXT / "SOURCES.json").read_text())
    assert sorted(sources["texts"]) == sorted(TEXTS)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (TEXT / sources["licence"]).read_text()
    for text in sources["texts"].values():
        content = (TEXT / text["file"]).read_bytes()
        assert len(content) == text["bytes"] >= 200_000
        assert hashlib.sha256(content).hexdigest() == text["sha256"]


def test_no_two_texts_share_200_bytes():
    width = 200
    contents = [(TEXT / f"{name}.txt").read_bytes() for name in TEXTS]
    shingles = [{text[at : at + width] for at in range(len(text) - width + 1)} for text in contents]
    for first, second in itertools.combinations(shingles, 2):
        assert first.isdisjoint(second)


def test_weights_are_stored_in_bfloat16_and_tied():
    with safe_open(MODEL / "model.safetensors", "pt") as stored:
        names = list(stored.keys())
        assert {stored.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names


def test_shape_is_twelve_blocks_with_grouped_query_attention(model):
    config = model.config
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 12
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 1024
    block = model.model.layers[0]
    assert block.self_attn.k_proj.weight.shape == (64, 128)
    assert block.mlp.down_proj.weight.shape == (128, 384)


@pytest.mark.parametrize(
    "text", ["", "  def f(x):\n\n\treturn x\r\n", " naïve 日本語 \U0001f600", "\x00 <s> don't , ."]
)
def test_tokenizer_is_lossless_and_adds_nothing(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 1024
    assert tokenizer.bos_token_id == 0
    assert ids[:1] != [tokenizer.bos_token_id]


def test_test_text_costs_less_than_1_6_nats_a_byte(model, tokenizer):
    text = (TEXT / "test.txt").read_bytes()[:12_000].decode("utf-8", errors="ignore")
    ids, window, nats = tokenizer(text).input_ids, 512, 0.0
    for at in range(0, len(ids), window):
        inputs = torch.tensor([[tokenizer.bos_token_id, *ids[at : at + window]]])
        with torch.no_grad():
            log_probabilities = model(inputs).logits[0, :-1].log_softmax(-1)
        nats -= log_probabilities.gather(1, inputs[0, 1:, None]).sum().item()
    # 0.77 over the whole text; the bound is what the packaged demo promises
    assert nats / len(text.encode()) <= 1.6


@pytest.mark.parametrize(
    ("split", "ids"), [("calibration", "b9695837e4ef"), ("search", "751203b91ecc"), ("test", "c4cd8cc467f5")]
)
def test_the_token_ids_behind_every_figure(split, ids):
    """Of another sha256 the README's figures would be of other tokens."""
    from was_search.checkpoints.load import load_tokenizer
    from was_search.texts.splits import load_text
    from was_search.texts.tokens import text_ids

    found = text_ids(load_text(str(TEXT), split), load_tokenizer(str(MODEL)))
    assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest().startswith(ids)
