"""Prompts: what begins them, what they may hold, and ids that the model has no row for."""

from __future__ import annotations

import pytest
import torch

from tests.places.checkpoints import checkpoint
from tests.places.tokenizers import with_template
from was_search.checkpoints.load import load_model
from was_search.errors import ModelError
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.service.settings import Settings
from was_search.service.steps.decoding import generate

MASK, SOP, BOS = 258, 259, 256


class Notes(Reporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def context_of(folder):
    return Context(Settings(model=str(folder), device="cpu", dtype="float32"), Notes())


@pytest.mark.parametrize(
    ("template", "ids"), [("[gMASK] <sop> $A", [MASK, SOP]), ("$A </s>", []), ("<s> $A </s>", [BOS])]
)
def test_a_prompt_begins_like_a_window_and_has_nothing_after_it(template, ids, tmp_path):
    folder = checkpoint(tmp_path, tokenizer=with_template(template))
    with context_of(folder) as context:
        found = generate(context, None, "abc", max_new_tokens=5)
    model = load_model(str(folder), dtype="float32")
    fed = torch.tensor([[*ids, 97, 98, 99]])
    out = model.generate(fed, attention_mask=torch.ones_like(fed), max_new_tokens=5, do_sample=False)
    assert found.text == with_template(template).decode(out[0, fed.shape[1] :], skip_special_tokens=True)


def test_control_tokens_in_a_prompt_are_read_and_said(tmp_path):
    with context_of(checkpoint(tmp_path, tokenizer=with_template("<s> $A"))) as context:
        generate(context, None, "a[gMASK]b</s>", max_new_tokens=2)
        assert "2 control token(s) are named in the prompt" in context.reporter.notes
        context.reporter.notes.clear()
        generate(context, None, "abc", max_new_tokens=2)
        assert not any("control" in note for note in context.reporter.notes)


def test_a_prompt_with_a_token_beyond_the_models_rows(tmp_path):
    folder = checkpoint(tmp_path, tokenizer=with_template("$A"), vocab_size=258)
    with context_of(folder) as context, pytest.raises(ModelError, match=r"id 259 \('<sop>'\) in the prompt, the model"):
        generate(context, None, "abc<sop>")
