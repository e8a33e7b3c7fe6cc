"""Text of tokens as they come: all parts are the whole text, no part of a character; and strings that end it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.places.tokenizers import slow_bytes
from was_search.checkpoints.load import load_tokenizer, resolve_model
from was_search.errors import ConfigError
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_search.texts.incremental import IncrementalText, until_stop


def llama_2():
    """Pieces with a mark for the blank, bytes for what has no piece, and a first blank that is left out."""
    pieces = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a", "b", "c"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


KINDS = {
    "bytes of words": load_tokenizer(resolve_model(str(DEMO_FOLDER / "model"))),
    "llama 2": llama_2(),
    "python": slow_bytes(),
}


def parts_of(tokenizer, ids, before=()):
    text = IncrementalText(tokenizer, before)
    return [*(text.add(token) for token in ids), text.rest()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from(["a b  c\n\n the", "naïve café 🙂🙃 日本語", "a 👩‍👩‍👧 b", " the"]))
def test_all_parts_are_the_whole_text(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = parts_of(tokenizer, ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(parts) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_give_text_and_are_not_held_for_ever(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    parts = parts_of(tokenizer, ids)
    assert len("".join(parts)) >= len(tokenizer.decode(ids, skip_special_tokens=True)) - 1
    assert len(parts_of(tokenizer, [*ids, *[ids[0] if ids else 5] * 20])) == len(ids) + 21


def test_a_text_goes_on_from_its_prompt():
    tokenizer = KINDS["llama 2"]
    ids = tokenizer(" a the bc", add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        new = "".join(parts_of(tokenizer, ids[cut:], before=ids[:cut]))
        assert tokenizer.decode(ids[:cut]) + new == whole


def test_parts_come_as_soon_as_they_are_known():
    tokenizer = KINDS["bytes of words"]
    ids = tokenizer("The ship sailed.", add_special_tokens=False)["input_ids"]
    assert all(parts_of(tokenizer, ids)[:-1])


@given(
    text=st.text("ab", max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_of_its_stops(text, cuts, stops):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[i:j] for i, j in pairwise(places)]
    found = "".join(until_stop(parts, stops))
    # Whichever string is complete first ends the text; it is looked for after each part, as tokens come.
    for end in places:
        begins = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if begins:
            assert found == text[: min(begins)]
            break
    else:
        assert found == text


def test_nothing_is_held_that_no_stop_begins_with_and_nothing_read_after_one():
    def parts():
        yield from ("abc", "d\n", "\nU", "ser", "never")
        pytest.fail("read on after the stop")

    assert list(until_stop(parts(), ["\nUser"])) == ["abc", "d", "\n"]
    assert list(until_stop(["x", "y"], [])) == ["x", "y"]


def test_an_empty_stop_is_refused():
    with pytest.raises(ConfigError, match="stop: a string that ends the text must not be empty"):
        list(until_stop(["a"], ["b", ""]))
