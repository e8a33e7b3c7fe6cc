from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness.cache import ArrayCache


@pytest.fixture
def make():
    calls: list[int] = []

    def made():
        calls.append(1)
        return {"end": np.arange(3.0), "levels": np.zeros((2, 2))}

    made.calls = calls
    return made


def test_what_is_there_is_not_made_again(make, tmp_path):
    folder = str(tmp_path / "new")
    parts = ("descent", np.arange(4), 0.5, {"step": 0.04})
    first = ArrayCache(folder).get(parts, make)
    again = ArrayCache(folder).get(parts, make)
    assert len(make.calls) == 1
    assert again.keys() == first.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)
    ArrayCache(folder).get(("descent", np.arange(5), 0.5, {"step": 0.04}), make)
    assert len(make.calls) == 2
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_without_a_folder_nothing_is_kept(make):
    for _ in range(2):
        ArrayCache().get(("a",), make)
    assert len(make.calls) == 2
