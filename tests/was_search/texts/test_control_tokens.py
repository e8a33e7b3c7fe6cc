"""The names of control tokens in a text are text; where a vocabulary spells them itself, they are counted and said."""

from __future__ import annotations

import numpy as np
import pytest

from tests.places.tokenizers import CONTROLS, SPELLS_CONTROLS, TEXT_IS_TEXT, Tekken, byte_bpe, with_words_of_its_own
from was_search.errors import DataError
from was_search.texts.protocol import EvaluationProtocol
from was_search.texts.splits import SplitText
from was_search.texts.tokens import control_ids, text_ids, tokenise

NAMED = " ".join(["hello <s> world </s> and <|im_start|>", *CONTROLS, "".join(CONTROLS)])


def text_of(text):
    return SplitText("book.txt", "test", text)


@pytest.mark.parametrize("build", TEXT_IS_TEXT)
def test_names_of_control_tokens_are_text(build):
    tokenizer = build()
    ids = text_ids(text_of(NAMED), tokenizer)
    assert len(ids) > len(NAMED) / 2
    assert not set(ids.tolist()) & control_ids(tokenizer)
    protocol = tokenise(text_of(NAMED * 9), tokenizer, sequence_length=16, bos=False).protocol
    assert protocol.control_tokens == 0
    assert "control" not in protocol.describe() and "control_tokens" not in protocol.to_json()


@pytest.mark.parametrize("build", TEXT_IS_TEXT[:-1])
def test_other_texts_have_the_ids_that_they_had(build):
    tokenizer = build()
    text = "the weather, and then?\nhello world "
    assert text_ids(text_of(text), tokenizer).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizer_reads_control_tokens_elsewhere_as_before():
    tokenizer = byte_bpe()
    before = tokenizer("a<s>b")["input_ids"]
    text_ids(text_of("a<s>b"), tokenizer)
    assert tokenizer("a<s>b")["input_ids"] == before
    assert tokenizer.bos_token_id in before


def test_an_added_word_is_no_control_token():
    tokenizer = with_words_of_its_own()
    word = tokenizer.convert_tokens_to_ids("<think>")
    assert text_ids(text_of("a<think>b<s>"), tokenizer).tolist().count(word) == 1
    assert word not in control_ids(tokenizer)


@pytest.mark.parametrize("build", SPELLS_CONTROLS)
def test_control_tokens_that_a_vocabulary_spells_are_counted(build):
    tokenizer = build()
    text = text_of("hello <s> world </s> and nobody " * 30)
    found = tokenise(text, tokenizer, sequence_length=8, bos=False)
    assert found.protocol.control_tokens == 60
    assert found.protocol.describe().endswith(", 60 control token(s) in its text")
    assert EvaluationProtocol.from_json(found.protocol.to_json()) == found.protocol
    assert tokenise(text_of("hello world and nobody " * 30), tokenizer, sequence_length=8).protocol.control_tokens == 0


def test_a_control_token_that_the_vocabulary_lacks_has_no_id():
    class Lacking(Tekken):
        all_special_ids = (1, None, 0)

    assert control_ids(Lacking()) == {1}
    assert tokenise(text_of("some text"), Lacking(), sequence_length=4, bos=False).protocol.control_tokens == 0


def test_a_text_that_a_tokenizer_cannot_read_is_named():
    class Broken:
        all_special_ids = ()

        def __call__(self, text, **_):
            raise RuntimeError("no such letter")

    with pytest.raises(DataError, match=r"book\.txt \[test\] cannot be tokenised \(RuntimeError: no such letter\)"):
        text_ids(text_of("a"), Broken())


def test_the_count_is_of_the_text_not_of_what_begins_a_window():
    from tests.places.tokenizers import with_template

    found = tokenise(text_of("ab" * 50), with_template("<s> $A"), sequence_length=5)
    assert np.all(found.tokens[:, 0] == 256)
    assert found.protocol.control_tokens == 0
