"""TOML files of settings with any values, or damaged: settings that hold their rules, or one line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import damaged, in_one_line
from was_search.errors import WasError
from was_search.process import plain_json
from was_search.service.settings import OPTIONS, Settings
from was_search.service.settings_file import load_settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**400, -1, 0, 1, 0.5, 1e300]))
WORDS = st.sampled_from(
    ["", "auto", "none", "0.5", "5%", "1:2", "2:1", "nan", "1e999", "~/x", "-1", "a,b", ",", "[", "on"]
)
VALUES = st.one_of(
    NUMBERS,
    WORDS,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.booleans(),
    st.just([1]),
    st.just({}),
)


def toml(values: dict[str, Any]) -> str:
    return "".join(f"{name} = {_written(value)}\n" for name, value in values.items())


def _written(value: Any) -> str:
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / "run.toml"


@settings(max_examples=EXAMPLES)
@given(values=st.dictionaries(st.sampled_from(sorted(OPTIONS)), VALUES, max_size=3))
def test_any_values(path: Path, values: dict[str, Any]) -> None:
    path.write_text(toml(values), encoding="utf-8")
    try:
        found = load_settings(path, {})
    except WasError as error:
        in_one_line(error)
        return
    assert Settings(**{name: getattr(found, name) for name in OPTIONS}) == found, "what was read can be given again"
    assert set(values) <= set(OPTIONS)
    plain_json.dumps({name: option.shown(getattr(found, name)) for name, option in OPTIONS.items()})
    assert found.worker_range.least >= 1


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_damaged_files(path: Path, data: st.DataObject) -> None:
    whole = toml({"model": "m", "data": "d", "target": 0.5, "trials": 20, "workers": "1:4", "targets": ""}).encode()
    path.write_bytes(data.draw(damaged(whole)))
    try:
        assert isinstance(load_settings(path, {}), Settings)
    except WasError as error:
        in_one_line(error)
