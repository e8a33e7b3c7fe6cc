"""JSON values."""

from __future__ import annotations

import numpy as np
import pytest

from was_search.errors import StorageError
from was_search.shape import ModelShape
from was_storage.server.plain import plain


def test_becomes_what_json_holds() -> None:
    value = {
        1: (np.float32(0.5), np.arange(2)),
        "b": [True, None, float("nan"), float("inf")],
        "c": np.int64(3),
    }
    assert plain(value) == {"1": [0.5, [0, 1]], "b": [True, None, None, None], "c": 3}


def test_asks_objects_for_their_json() -> None:
    shape = ModelShape(((1,) * 7,), ((2,) * 7,))
    assert plain({"shape": shape}) == {"shape": shape.to_json()}


def test_refuses_what_has_no_json_form() -> None:
    with pytest.raises(StorageError, match="a set cannot be stored as JSON"):
        plain({"x": {1}})


def test_refuses_nul_characters() -> None:
    with pytest.raises(StorageError, match="NUL"):
        plain("a\0b")
