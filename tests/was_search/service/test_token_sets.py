"""Token ids that a model has no row for are refused where text is tokenised, cached or not."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken

from tests.places.checkpoints import checkpoint, tiny_llama
from tests.places.tokenizers import with_template
from was_search.checkpoints.structure import token_rows
from was_search.errors import ModelError
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.token_sets import TokenSets, tokens_here

MESSAGE = (
    r"the tokenizer gives id 260 \('<extra>'\) in text\.txt \[test\], the model has 260 rows .*resize_token_embeddings"
)


class Rows:
    """The cache's rows in memory."""

    def __init__(self):
        self.rows = {}

    def get(self, kind, key, read):
        found = self.rows.get((kind, key))
        return None if found is None else read(found)

    def put(self, kind, key, payload, meta):
        from types import SimpleNamespace

        self.rows[kind, key] = SimpleNamespace(payload=payload, meta=json.loads(json.dumps(meta)))


def with_one_more():
    made = with_template("$A")
    made.add_tokens([AddedToken("<extra>", special=False)])
    return made


def context_of(folder, text):
    (folder / "text.txt").write_text(text * 60)
    return Context(Settings(model=str(folder), data=str(folder / "text.txt"), sequence_length=16, device="cpu"))


def test_an_added_token_that_the_text_uses(tmp_path):
    with context_of(checkpoint(tmp_path, tokenizer=with_one_more()), "one <extra> word\n") as context:
        with pytest.raises(ModelError, match=MESSAGE):
            tokens_here(context, "test")
        context.cache = Rows()
        with pytest.raises(ModelError, match=MESSAGE):
            _ = TokenSets(context).test
        assert not context.cache.rows


def test_an_added_token_that_no_text_uses(tmp_path):
    with context_of(checkpoint(tmp_path, tokenizer=with_one_more()), "one other word\n") as context:
        assert tokens_here(context, "test").tokens.max() < 256


def test_cached_ids_of_a_model_with_more_rows(tmp_path):
    cache = Rows()
    for rows in (261, 260):
        folder = checkpoint(tmp_path, tokenizer=with_one_more(), vocab_size=rows)
        with context_of(folder, "one <extra> word\n") as context:
            context.cache = cache
            if rows == 261:
                assert TokenSets(context).test.tokens.max() == 260
            else:
                with pytest.raises(ModelError, match=MESSAGE):
                    _ = TokenSets(context).test


def test_a_template_of_ids_beyond(tmp_path):
    folder = checkpoint(tmp_path, tokenizer=with_template("[gMASK] <sop> $A"), vocab_size=259)
    with (
        context_of(folder, "one word\n") as context,
        pytest.raises(ModelError, match=r"id 259 \('<sop>'\) in text"),
    ):
        tokens_here(context, "test")


def test_the_fewer_rows_of_embedding_and_head_count():
    import torch

    model = tiny_llama()
    assert token_rows(model) == 260
    model.lm_head = torch.nn.Linear(32, 258)
    assert token_rows(model) == 258
    model.set_input_embeddings(torch.nn.Embedding(100, 32))
    assert token_rows(model) == 100
