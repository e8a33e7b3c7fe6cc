"""GGUF files with damaged headers: a model that loads, or one line that refuses it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.doubles.tiny_gguf import write_tiny_gguf
from tests.fuzz.mutations import damaged, in_one_line
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.gguf_header import read_header
from was_search.checkpoints.load import load_model, load_tokenizer
from was_search.errors import WasError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    write_tiny_gguf(path, quantise="Q8_0")
    return path


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_headers(whole: Path, data: st.DataObject) -> None:
    content, start = whole.read_bytes(), read_header(whole).data_start
    path = whole.with_name("damaged.gguf")
    path.write_bytes(data.draw(damaged(content[:start])) + content[start:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(whole.parent / "cache"))
        try:
            source = resolve_model(str(path))
            assert load_model(source, dtype="float32").config.num_hidden_layers == 1
            load_tokenizer(source)
        except WasError as error:
            in_one_line(error)
        finally:
            shutil.rmtree(whole.parent / "cache", ignore_errors=True)
