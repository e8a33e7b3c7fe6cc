"""Checkpoints with other values and damaged files: read as transformers reads them, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.fuzz.mutations import as_bytes, changed, damaged, in_one_line
from tests.places.checkpoints import INDEX, READ, checkpoint
from tests.places.tokenizers import with_template
from was_search.checkpoints.empty_model import empty_model
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model, load_tokenizer
from was_search.checkpoints.positions import most_positions
from was_search.checkpoints.structure import find_structure, token_rows
from was_search.errors import WasError
from was_search.texts.splits import SplitText
from was_search.texts.tokens import control_ids, tokenise

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
CONFIG_KEYS = (
    *("rope_scaling", "rope_parameters", "text_config", "quantization_config", "transformers_weights", "auto_map"),
    *("configuration_files", "architectures", "dtype", "layer_types", "tie_word_embeddings", "attn_implementation"),
    *("head_dim", "is_encoder_decoder", "fusion_config", "num_hidden_layers", "max_position_embeddings"),
)
TOKENIZER_KEYS = (
    *("fast_tokenizer_files", "tokenizer_class", "auto_map", "add_bos_token", "bos_token", "unk_token", "padding"),
    *("split_special_tokens", "truncation", "normalizer", "pre_tokenizer", "model_max_length", "chat_template"),
    *("added_tokens_decoder", "extra_special_tokens"),
)
TEXT = SplitText("book.txt", "test", "some words <s> and é more </s>\n" * 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("whole"), tokenizer=with_template("<s> $A"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return READ["shards"](tmp_path_factory.mktemp("shards"))


def same_as_transformers(folder: Path) -> None:
    ours = load_model(str(folder), dtype="float32").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@contextmanager
def put_back(path: Path) -> Iterator[bytes]:
    """The file's content, which it has again afterwards; what the block may end with is an error of one line."""
    whole = path.read_bytes()
    try:
        yield whole
    except WasError as error:
        in_one_line(error)
    finally:
        path.write_bytes(whole)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_configurations(folder: Path, data: st.DataObject) -> None:
    path = folder / "config.json"
    with put_back(path) as whole:
        document = data.draw(changed(json.loads(whole), CONFIG_KEYS))
        path.write_bytes(as_bytes(document))
        source = resolve_model(str(folder))
        model = empty_model(source)
        assert find_structure(model).shape.n_blocks == document["num_hidden_layers"]
        assert token_rows(model) == document["vocab_size"]
        most_positions(document)
        same_as_transformers(folder)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_indices(shards: Path, data: st.DataObject) -> None:
    path = shards / INDEX
    with put_back(path) as whole:
        documents = changed(json.loads(whole), ("weight_map", "metadata"))
        path.write_bytes(data.draw(st.one_of(documents.map(as_bytes), damaged(whole))))
        source = resolve_model(str(shards))
        assert all(file.parent == source.folder and file.is_file() for file in source.weight_files())
        fingerprint(source)
        same_as_transformers(shards)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_weights(folder: Path, data: st.DataObject) -> None:
    path = folder / "model.safetensors"
    with put_back(path) as whole:
        header = 8 + int.from_bytes(whole[:8], "little")
        content = data.draw(damaged(whole[:header])) + whole[header:]
        path.write_bytes(content)
        same_as_transformers(folder)


@settings(max_examples=2 * EXAMPLES)
@given(data=st.data())
def test_tokenizers(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    with put_back(path) as whole:
        documents: Any = changed(json.loads(whole), TOKENIZER_KEYS)
        path.write_bytes(data.draw(st.one_of(documents.map(as_bytes), damaged(whole))))
        tokenizer = load_tokenizer(resolve_model(str(folder)))
        found = tokenise(TEXT, tokenizer, sequence_length=16)
        inner = found.tokens[:, found.protocol.first_tokens :]
        named = set(inner.ravel().tolist()) & control_ids(tokenizer)
        assert not named or found.protocol.control_tokens
        found.protocol.describe()


def test_the_folders_are_as_they_were(folder: Path, shards: Path, tmp_path: Path) -> None:
    """What stands above has put everything back."""
    for place in (folder, shards):
        shutil.copytree(place, tmp_path / place.name)
        same_as_transformers(tmp_path / place.name)
