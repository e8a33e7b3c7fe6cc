"""What a compensation keeps on other text: the texts that are learned from, and the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import foreign_text
from benchmarks.harness.problem import DEMO, Engine, learning_text
from tests.doubles.tiny_models import tiny_model


def test_a_model_writes_the_same_text_from_the_same_seed():
    model = tiny_model("llama", torch.float32)
    model.set_attn_implementation("sdpa")
    found = [foreign_text.written(model, 3, 12, seed) for seed in (0, 0, 1)]
    assert found[0].shape == (3, 12) and found[0].dtype == np.int64
    assert found[0].min() >= 0 and found[0].max() < model.config.vocab_size
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_written_text_is_likely_to_the_model():
    """Sampled tokens have the entropy of the model's own distribution as their loss; random ones have more."""
    model = tiny_model("llama", torch.float32)
    model.set_attn_implementation("sdpa")
    sampled = torch.tensor(foreign_text.written(model, 16, 17, 0))
    with torch.inference_mode():
        logits = model(input_ids=sampled).logits[:, :-1]
    log_probs = logits.log_softmax(-1)
    loss = -log_probs.gather(2, sampled[:, 1:, None]).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    assert float(loss) == pytest.approx(float(entropy), rel=0.1)
    assert float(loss) < 0.9 * float(-log_probs.mean())


@pytest.mark.slow(seconds=15)
def test_rows_of_every_text(tmp_path):
    arguments = "--targets 0.6 --steps 2 --method fisher --dtype float32 --sequence-length 32 --device cpu --written 3"
    text = str(DEMO / "text")
    options = foreign_text.parse(
        ["--model", str(DEMO / "model"), "--data", text, "--foreign", text, *arguments.split()]
    )
    engine = Engine(foreign_text._setup(options, options.data))
    found = {row["text"]: row for row in foreign_text.rows(engine, options)}
    assert list(found) == ["own", "text", "own and written", "text and written", "written"]
    assert found["own"]["kept"] == 1.0
    assert found["text"]["test_nats"] == found["own"]["test_nats"]  # the same text under another name
    n = len(learning_text(engine.data, 0).tokens)
    assert [row["sequences"] for row in found.values()] == [n, n, n + 3, n + 3, 3]
    assert all(row["dense_nats"] < row["test_nats"] for row in found.values())
