from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from was_search.errors import ConfigError
from was_search.shape import ModelShape
from was_search.texts.protocol import Evaluation, EvaluationProtocol, content_hash, perplexity

VALUES = {
    "data": "a.txt",
    "data_hash": "0123456789abcdef",
    "split": "search",
    "sequence_length": 128,
    "stride": 128,
    "n_sequences": 10,
    "bos": True,
    "dtype": "bfloat16",
    "batch_size": 4,
    "dense_prefix": 1,
}


@pytest.mark.parametrize(("stride", "predicted"), [(128, 127), (127, 127), (32, 32), (1, 1)])
def test_predicted_tokens(stride, predicted):
    protocol = EvaluationProtocol(**{**VALUES, "stride": stride})
    assert protocol.predicted_per_sequence == predicted
    assert protocol.predicted_tokens == 10 * predicted


def test_overlapping_windows_predict_every_token_once():
    """Windows of 8 every 3 tokens: each predicts its last 3, which the next window does not predict again."""
    protocol = EvaluationProtocol(**{**VALUES, "sequence_length": 8, "stride": 3})
    predicted = [s + 8 - 1 - i for s in range(0, 30, 3) for i in range(protocol.predicted_per_sequence)]
    assert sorted(predicted) == list(range(5, 35))


def test_description_names_everything_that_decides_a_loss():
    text = EvaluationProtocol(**{**VALUES, "stride": 32}).describe()
    assert text == (
        "a.txt [search] sha256:01234567, 10 x 128 tokens, stride 32, bfloat16, batch 4, BOS, first 1 token(s) dense"
    )
    assert "stride" not in EvaluationProtocol(**VALUES).describe()
    assert "no BOS" in EvaluationProtocol(**{**VALUES, "bos": False}).describe()


def test_json_round_trip():
    protocol = EvaluationProtocol(**VALUES)
    assert EvaluationProtocol.from_json(protocol.to_json()) == protocol


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("split", "train", "split: must be one of calibration, search, test, got 'train'"),
        ("sequence_length", 1, "sequence_length: must be at least 2 tokens, got 1"),
        ("stride", 0, r"stride: must be in \[1, sequence_length=128\], got 0"),
        ("stride", 129, r"stride: must be in \[1, sequence_length=128\], got 129"),
        ("n_sequences", 0, "n_sequences: must be at least 1, got 0"),
        ("batch_size", 0, "batch_size: must be at least 1, got 0"),
        ("dense_prefix", -1, r"dense_prefix: must be in \[0, sequence_length\), got -1"),
        ("dense_prefix", 128, r"dense_prefix: must be in \[0, sequence_length\), got 128"),
    ],
)
def test_every_rule(name, value, match):
    with pytest.raises(ConfigError, match=match):
        EvaluationProtocol(**{**VALUES, name: value})


def test_hash_is_the_same_in_every_process():
    code = (
        "import numpy; from was_search.texts.protocol import content_hash\n"
        "print(content_hash('a', 1, {'y': 2, 'x': [0.1]}, numpy.arange(3)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert found.stdout.strip() == content_hash("a", 1, {"x": [0.1], "y": 2}, np.arange(3))


def test_hash_tells_contents_apart():
    shape = ModelShape(((8,) * 7,), ((8,) * 7,))
    array = np.arange(6.0)
    parts = [
        ("a",),
        ("b",),
        ("a", None),
        (1,),
        (1.5,),
        (np.float32(2.5),),
        (array,),
        (array.astype(np.float32),),
        (array.reshape(2, 3),),
        (array + 1e-12,),
        (shape,),
        (EvaluationProtocol(**VALUES),),
        (EvaluationProtocol(**{**VALUES, "bos": False}),),
    ]
    assert len({content_hash(*p) for p in parts}) == len(parts)
    assert content_hash(np.asfortranarray(array.reshape(2, 3))) == content_hash(array.reshape(2, 3))
    assert content_hash(np.int64(3)) == content_hash(3)


def test_hash_refuses_what_has_no_content():
    with pytest.raises(TypeError, match="cannot hash a object"):
        content_hash(object())


def test_loss_is_the_mean_of_the_sequences():
    evaluation = Evaluation(np.array([1.0, 2.0, 4.5]), 300, 1.0, False, np.zeros((1, 7)))
    assert evaluation.loss_nats == 2.5
    assert math.isnan(Evaluation(np.array([1.0, np.nan]), 2, 1.0, False, np.zeros((1, 7))).loss_nats)


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(5.47)) == pytest.approx(5.47)
    assert perplexity(5000.0) == math.inf
    assert math.isnan(perplexity(math.nan)) or perplexity(math.nan) == math.inf
