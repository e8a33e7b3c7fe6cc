"""Windows against a slow reading of the protocol, on tokenizers of one token a byte."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from was_search.errors import ConfigError, DataError
from was_search.texts.splits import SplitText
from was_search.texts.tokens import text_ids, tokenise

BOS = 256


def byte_tokenizer(*, template=None, bos="<s>", **options):
    """Byte b has id b; <s> is 256, </s> 257."""
    alphabet = {chr(b): b for b in range(256)}
    made = Tokenizer(models.BPE(vocab={**alphabet, "<s>": BOS, "</s>": 257}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    if template:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", 257)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token="</s>", **options)


PLAIN = byte_tokenizer()
WITH_BOS = byte_tokenizer(template="<s> $A")


def text_of(length):
    """``length`` different neighbours: token i is 32 + i % 90."""
    return SplitText("book.txt", "test", "".join(chr(32 + i % 90) for i in range(length)))


def slow_windows(text, length, stride, bos):
    ids = [ord(c) for c in text.text]
    span = length - bos
    starts = [s for s in range(0, len(ids), stride) if s + span <= len(ids)]
    return [[BOS] * bos + ids[s : s + span] for s in starts]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [2, 7, 16])
@pytest.mark.parametrize("stride", [None, 1, 3])
@pytest.mark.parametrize("size", [16, 17, 50, 101])
def test_all_windows_are_those_of_a_slow_reading(bos, length, stride, size):
    stride = None if stride is None else min(stride, length)
    text = text_of(size)
    found = tokenise(text, PLAIN, sequence_length=length, stride=stride, bos=bos)
    expected = slow_windows(text, length, stride or length, bos)
    assert sorted(map(tuple, found.tokens.tolist())) == sorted(map(tuple, expected))
    assert found.tokens.dtype == np.int64
    assert found.protocol.n_sequences == len(expected)


def starts_of(found, text, stride):
    """Window numbers, from windows that are unique within 90 tokens, by their place in the text."""
    ids = np.array([ord(c) for c in text.text])
    width = found.tokens.shape[1]
    return [
        next(k for k in range(len(ids)) if np.array_equal(ids[k * stride : k * stride + width], row))
        for row in found.tokens
    ]


@pytest.mark.parametrize(("count", "chosen"), [(1, {4}), (2, {2, 6}), (3, {1, 4, 7}), (8, {0, 1, 2, 3, 5, 6, 7, 8})])
def test_fewer_windows_are_spread_over_the_text(count, chosen):
    text = text_of(90)
    found = tokenise(text, PLAIN, sequence_length=10, n_sequences=count, bos=False)
    assert set(starts_of(found, text, 10)) == chosen
    assert found.tokens.shape == (count, 10)


@pytest.mark.parametrize("there", range(1, 40))
def test_no_window_is_taken_twice(there):
    text = text_of(2 * there)
    for count in range(1, there + 1):
        rows = tokenise(text, PLAIN, sequence_length=2, n_sequences=count, bos=False).tokens
        assert rows.shape == (count, 2)
        assert len({tuple(row) for row in rows.tolist()}) == count


def test_the_order_is_shuffled_by_the_seed_alone():
    text = text_of(90)
    one, same, other = (tokenise(text, PLAIN, sequence_length=9, seed=seed).tokens for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert sorted(one.tolist()) == sorted(other.tolist()) != one.tolist()


def test_the_protocol_says_what_was_done():
    text = text_of(100)
    found = tokenise(
        text, WITH_BOS, sequence_length=16, stride=8, n_sequences=3, dtype="float32", batch_size=5, dense_prefix=2
    )
    protocol = found.protocol
    assert (protocol.data, protocol.split, protocol.data_hash) == ("book.txt", "test", text.sha256)
    assert (protocol.sequence_length, protocol.stride, protocol.n_sequences, protocol.bos) == (16, 8, 3, True)
    assert (protocol.dtype, protocol.batch_size, protocol.dense_prefix) == ("float32", 5, 2)
    assert (found.tokens[:, 0] == BOS).all()
    assert tokenise(text, PLAIN, sequence_length=16).protocol.stride == 16


def test_the_text_has_no_special_tokens_inside():
    ids = text_ids(text_of(50), byte_tokenizer(template="<s> $A </s>"))
    assert ids.tolist() == [32 + i for i in range(50)]


def test_long_texts_cause_no_warning(caplog):
    tokenizer = byte_tokenizer(model_max_length=8)
    with caplog.at_level(logging.DEBUG):
        tokenise(text_of(100), tokenizer, sequence_length=10)
    assert not caplog.records


def test_more_sequences_than_there_are():
    with pytest.raises(DataError, match=r"book\.txt \[test\] has 6 sequences of 16 tokens, 7 were asked for"):
        tokenise(text_of(100), PLAIN, sequence_length=16, n_sequences=7)
    found = tokenise(text_of(100), PLAIN, sequence_length=16, n_sequences=7, at_most=True)
    assert len(found.tokens) == found.protocol.n_sequences == 6


@pytest.mark.parametrize(("bos", "needed"), [(False, 16), (True, 15)])
def test_too_short_for_one_sequence(bos, needed):
    text = text_of(needed - 1)
    for at_most in (False, True):
        message = rf"book\.txt \[test\] has {needed - 1} tokens, one sequence needs {needed}"
        with pytest.raises(DataError, match=message):
            tokenise(text, PLAIN, sequence_length=16, bos=bos, n_sequences=1, at_most=at_most)


def test_bos_asked_of_a_tokenizer_without_one():
    with pytest.raises(ConfigError, match="bos: the tokenizer has no BOS token"):
        tokenise(text_of(50), byte_tokenizer(bos=None), sequence_length=8, bos=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "sequence_length: must be at least 2"),
        ({"stride": 0}, r"stride: must be in \[1"),
        ({"stride": 9}, r"stride: must be in \[1"),
        ({"n_sequences": 0}, "n_sequences: must be at least 1"),
        ({"dense_prefix": 8}, "dense_prefix: must be in"),
    ],
)
def test_values_outside_their_range(options, message):
    with pytest.raises(ConfigError, match=message):
        tokenise(text_of(50), PLAIN, **{"sequence_length": 8, **options})
