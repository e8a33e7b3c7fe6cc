"""Plans with other values or damaged files: the plan that was written, or refused in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.doubles.tiny_models import tiny_model, tiny_plan
from tests.fuzz.mutations import as_bytes, changed, damaged, in_one_line
from was_search.checkpoints.column_layout import COLUMNS_NAME, save_columns
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.load import load_model
from was_search.compensation import Compensation
from was_search.errors import WasError
from was_search.plan import JSON_NAME, TENSORS_NAME, Plan
from was_search.process import plain_json
from was_search.service.cli.plan import load_plan

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))


@pytest.fixture(scope="module", params=["plain", "compensated"])
def plan(request: pytest.FixtureRequest) -> Plan:
    made = tiny_plan(tiny_model())
    if request.param == "plain":
        return made
    return dataclasses.replace(made, compensation=Compensation.none(made.shape))


@pytest.fixture(scope="module")
def folder(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plan.save(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    model.float().save_pretrained(checkpoint)
    return save_columns(model, tiny_plan(model), resolve_model(str(checkpoint)), tmp_path_factory.mktemp("columns"))


def sealed(document: object) -> bytes:
    """The document with the hash that its writer would have given it."""
    if not isinstance(document, dict):
        return as_bytes(document)
    body = {key: value for key, value in document.items() if key != "sha256"}
    body = json.loads(json.dumps(body))
    return as_bytes({**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()})


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_documents(folder: Path, plan: Plan, data: st.DataObject) -> None:
    path = folder / JSON_NAME
    whole = path.read_bytes()
    try:
        path.write_bytes(sealed(data.draw(changed(json.loads(whole), ("provenance", "metrics", "settings")))))
        found = Plan.load(folder)
        assert np.array_equal(found.thresholds, plan.thresholds)
        assert np.array_equal(found.sparsities, plan.sparsities)
        assert found.shape == plan.shape
        assert (found.compensation is None) is (plan.compensation is None)
        assert isinstance(found.dense_prefix, int)
        load_plan(folder)
        found.save(folder)
        assert Plan.load(folder).provenance == json.loads(plain_json.dumps(found.provenance))  # Infinity as null
    except WasError as error:
        in_one_line(error)
    finally:
        path.write_bytes(whole)
        plan.save(folder)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_damaged_files(folder: Path, plan: Plan, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from([JSON_NAME, TENSORS_NAME]))
    whole = path.read_bytes()
    try:
        content = data.draw(damaged(whole))
        path.write_bytes(content)
        found = Plan.load(folder)
        assert np.array_equal(found.thresholds, plan.thresholds)
        assert found.provenance == plan.provenance
    except WasError as error:
        in_one_line(error)
    finally:
        path.write_bytes(whole)


@settings(max_examples=EXAMPLES // 3)
@given(data=st.data())
def test_layouts_for_decoding(columns: Path, data: st.DataObject) -> None:
    path = columns / COLUMNS_NAME
    whole = path.read_bytes()
    try:
        document = data.draw(changed(json.loads(whole), ("files", "columns", "dtype")))
        path.write_bytes(as_bytes(document))
        found = load_model(str(columns), dtype="float32")
        expected = tiny_model().float().state_dict()
        if json.loads(whole)["columns"] == document["columns"]:
            assert all(weight.equal(expected[name]) for name, weight in found.state_dict().items())
    except WasError as error:
        in_one_line(error)
    finally:
        path.write_bytes(whole)
