"""What begins a window is one thing: what the tokenizer puts before a text, whether it is BOS or not."""

from __future__ import annotations

import pytest

from tests.places.tokenizers import Tekken, metaspace_bpe, slow_bytes, with_template, word_piece
from was_search.errors import ConfigError, DataError, ModelError
from was_search.texts.protocol import EvaluationProtocol
from was_search.texts.splits import SplitText
from was_search.texts.tokens import beginning, prompt_ids, require_rows, tokenise

BOS, EOS, MASK, SOP = 256, 257, 258, 259
TEMPLATES = {
    "$A": (),
    "$A </s>": (),
    "<s> $A": (BOS,),
    "<s> $A </s>": (BOS,),
    "</s> $A": (EOS,),
    "[gMASK] <sop> $A": (MASK, SOP),
    "[gMASK] <sop> $A </s>": (MASK, SOP),
    "[gMASK] <s> <sop> $A": (MASK, BOS, SOP),
}
TEXT = SplitText("book.txt", "test", "".join(chr(32 + i % 90) for i in range(200)))


def template(text, bos="<s>"):
    return with_template(text, bos=bos)


@pytest.mark.parametrize(("text", "ids"), TEMPLATES.items())
@pytest.mark.parametrize("bos", ["<s>", None])
def test_windows_and_prompts_begin_as_the_tokenizer_begins_a_text(text, ids, bos, tmp_path):
    from transformers import AutoTokenizer

    made = template(text, bos)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert beginning(tokenizer) == ids
        found = tokenise(TEXT, tokenizer, sequence_length=16)
        assert all(tuple(row[: len(ids)]) == ids and row[len(ids) :].max() < BOS for row in found.tokens)
        assert prompt_ids("abc", tokenizer).tolist() == [*ids, 97, 98, 99]
        protocol = found.protocol
        assert (protocol.first_tokens, protocol.bos) == (len(ids), bos is not None and BOS in ids)
        assert protocol.dense_prefix == max(1, len(ids))
        assert protocol.predicted_per_sequence == 16 - max(1, len(ids))
        assert EvaluationProtocol.from_json(protocol.to_json()) == protocol


@pytest.mark.parametrize("build", [metaspace_bpe, word_piece, slow_bytes])
def test_kinds_that_begin_with_nothing(build):
    assert beginning(build()) == ()


def test_what_the_protocol_says_of_it():
    told = {text: tokenise(TEXT, template(text), sequence_length=16).protocol.describe() for text in TEMPLATES}
    assert ", no BOS, first 1 token(s) dense" in told["$A"]
    assert ", BOS, first 1 token(s) dense" in told["<s> $A"]
    assert ", 2 tokens of the tokenizer first, no BOS among them, first 2 token(s) dense" in told["[gMASK] <sop> $A"]
    assert ", 3 tokens of the tokenizer first, BOS among them, first 3 " in told["[gMASK] <s> <sop> $A"]


def test_usual_protocols_are_written_as_before():
    for text in ("$A", "<s> $A"):
        assert "begins" not in tokenise(TEXT, template(text), sequence_length=16).protocol.to_json()
    assert tokenise(TEXT, template("</s> $A"), sequence_length=16).protocol.to_json()["begins"] == 1


def test_a_prefix_that_is_asked_for_is_taken():
    assert tokenise(TEXT, template("[gMASK] <sop> $A"), sequence_length=16, dense_prefix=1).protocol.dense_prefix == 1


def test_bos_that_is_asked_for_comes_first():
    made = template("[gMASK] <sop> $A")
    assert tokenise(TEXT, made, sequence_length=16, bos=True).tokens[0, :3].tolist() == [BOS, MASK, SOP]
    assert tokenise(TEXT, made, sequence_length=16, bos=False).protocol.first_tokens == 0


def test_a_window_must_hold_more_than_what_begins_it():
    with pytest.raises(ConfigError, match=r"sequence_length: must be above the 2 token\(s\) that the tokenizer puts"):
        tokenise(TEXT, template("[gMASK] <sop> $A"), sequence_length=2)


def test_a_prompt_that_begins_so_itself_is_left_as_it_is():
    assert prompt_ids("[gMASK]<sop>abc", template("[gMASK] <sop> $A")).tolist() == [MASK, SOP, 97, 98, 99]
    assert prompt_ids("<s>abc", template("<s> $A")).tolist() == [BOS, 97, 98, 99]
    assert prompt_ids("a</s>", template("<s> $A </s>")).tolist() == [BOS, 97, EOS]


def test_prompts_that_give_no_tokens():
    from tests.places.tokenizers import byte_bpe

    with pytest.raises(DataError, match="prompt: the tokenizer makes no tokens of 'é'"):
        prompt_ids("é", byte_bpe())
    with pytest.raises(DataError, match="prompt: cannot be tokenised"):
        prompt_ids("\ud800", byte_bpe())


@pytest.mark.parametrize(("ids", "rows"), [([0, 259], 259), ([-1, 3], 260)])
def test_ids_without_a_row_are_named(ids, rows):
    import numpy as np

    with pytest.raises(ModelError, match=rf"gives id {max(i for i in ids if i < 0 or i >= rows)} .*has {rows} rows"):
        require_rows(np.array(ids), rows, template("$A"), "x.txt [test]")
    require_rows(np.array([0, 258]), 259, template("$A"), "x.txt [test]")
    with pytest.raises(ModelError, match=r"gives id 300 in x\.txt \[test\], the model has 9 rows"):
        require_rows(np.array([300]), 9, Tekken(), "x.txt [test]")
