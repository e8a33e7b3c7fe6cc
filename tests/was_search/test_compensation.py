from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.was_search.test_plan import SHAPE, make_plan, rewrite
from was_search.compensation import Compensation
from was_search.errors import PlanError
from was_search.plan import JSON_NAME, TENSORS_NAME, Plan


def same(one: Compensation | None, other: Compensation | None) -> bool:
    """Whether two compensations hold the same values; None is like none only."""
    if one is None or other is None:
        return one is other
    pairs = zip(one.named(), other.named(), strict=True)
    return all(name == its_name and np.array_equal(a, b) for (name, a), (its_name, b) in pairs)


def drawn(seed: int = 0) -> Compensation:
    size = Compensation.none(SHAPE).flat().size
    return Compensation.from_flat(SHAPE, np.random.default_rng(seed).normal(1, 0.1, size).astype(np.float32))


def test_none_changes_nothing():
    flat = Compensation.none(SHAPE).flat()
    outputs = sum(sum(row) for row in SHAPE.out_features)
    assert flat.dtype == np.float32
    assert flat.tolist() == [1.0] * outputs + [0.0] * outputs


def test_flat_there_and_back():
    one = drawn()
    again = Compensation.from_flat(SHAPE, one.flat())
    assert same(one, again)
    assert not same(one, drawn(1))
    assert not same(one, None)
    assert same(None, None)
    assert [name for name, _ in one.named()] == Compensation.names(SHAPE.n_blocks)
    assert dict(one.named())["constants.1.down"].shape == (3,)


def test_a_plan_carries_it(tmp_path):
    plan = make_plan(compensation=drawn())
    folder = plan.save(tmp_path / "plan")
    assert same(Plan.load(folder).compensation, plan.compensation)
    assert json.loads((folder / JSON_NAME).read_text())["schema_version"] == 2


def test_a_plan_without_is_written_as_before(tmp_path):
    folder = make_plan().save(tmp_path / "plan")
    assert Plan.load(folder).compensation is None
    assert json.loads((folder / JSON_NAME).read_text())["schema_version"] == 1
    assert not any(name.startswith(("scales", "constants")) for name in load((folder / TENSORS_NAME).read_bytes()))


def test_a_plan_that_lacks_one_of_its_vectors(tmp_path):
    folder = make_plan(compensation=drawn()).save(tmp_path / "plan")
    tensors = load((folder / TENSORS_NAME).read_bytes())
    del tensors["constants.1.k"]
    payload = save(tensors)
    (folder / TENSORS_NAME).write_bytes(payload)

    def declare(document) -> None:
        import hashlib

        document["tensors"].update(bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest())

    rewrite(folder, declare)
    with pytest.raises(PlanError, match=r"has no 'constants\.1\.k'"):
        Plan.load(folder)


@pytest.mark.parametrize("kind", ["scales", "constants"])
@pytest.mark.parametrize(
    ("vector", "why"),
    [
        (np.ones(4, np.float32), "one float32 array of out_features"),
        (np.ones(3, np.float64), "one float32 array of out_features"),
        (np.asarray([1, np.nan, 1], np.float32), "must be finite"),
        (np.asarray([1, np.inf, 1], np.float32), "must be finite"),
    ],
)
def test_vectors_of_another_kind_are_refused(kind, vector, why):
    rows = [list(row) for row in getattr(drawn(), kind)]
    rows[1][0] = vector
    wrong = dataclasses.replace(drawn(), **{kind: tuple(map(tuple, rows))})
    with pytest.raises(PlanError, match=f"{kind}: {why}"):
        make_plan(compensation=wrong)
