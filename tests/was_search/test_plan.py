from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from was_search.errors import PlanError
from was_search.plan import _ENTRIES, JSON_NAME, TENSORS_NAME, Plan, _document_hash, require_writable
from was_search.shape import ModelShape

SHAPE = ModelShape(((3, 3, 3, 3, 3, 3, 5),) * 2, ((3, 1, 1, 3, 5, 5, 3),) * 2)


def make_plan(**changes) -> Plan:
    rng = np.random.default_rng(0)
    values = {
        "model": "ada/tiny",
        "revision": "main",
        "fingerprint": "f" * 64,
        "shape": SHAPE,
        "score": "l2",
        "budget": 0.6,
        "dense_prefix": 1,
        "sparsities": rng.uniform(0, 0.9, (2, 7)),
        "thresholds": rng.uniform(0, 2, (2, 7)).astype(np.float32),
        "norms": tuple(tuple(rng.uniform(0, 1, w).astype(np.float32) for w in row) for row in SHAPE.in_features),
        "achieved": {"test": 0.59},
        "metrics": {"test": {"loss_nats": 1.25, 9: "nine", 10: (1, 2)}},
        "provenance": {"study": "s", "slot": 4},
    }
    return Plan(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    return make_plan().save(tmp_path / "plan")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_plan().save(tmp_path_factory.mktemp("plans") / "plan")


def same(a: Plan, b: Plan) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("sparsities", "thresholds"))
    norms = all(np.array_equal(x, y) for r, s in zip(a.norms, b.norms, strict=True) for x, y in zip(r, s, strict=True))
    rest = (
        "model",
        "revision",
        "fingerprint",
        "shape",
        "score",
        "budget",
        "dense_prefix",
        "achieved",
        "provenance",
    )
    return arrays and norms and all(getattr(a, n) == getattr(b, n) for n in rest)


def rewrite(folder, change) -> None:
    """Edit the document as its author would: with a hash that fits."""
    document = json.loads((folder / JSON_NAME).read_text())
    change(document)
    document["sha256"] = _document_hash(document)
    (folder / JSON_NAME).write_text(json.dumps(document))


def lacks(file: str, key: str) -> str:
    return (
        rf"{re.escape(file)}: has no '{key}', which plans of its schema_version have; "
        "another version of was-search wrote it, or it was changed; export it again"
    )


def test_round_trip_is_exact(folder):
    found = Plan.load(folder)
    assert same(found, make_plan())
    assert (found.sparsities.dtype, found.thresholds.dtype) == (np.float64, np.float32)
    # JSON knows text keys and lists only; a hash over the other forms would refuse the plan's own file.
    assert found.metrics == {"test": {"loss_nats": 1.25, "9": "nine", "10": [1, 2]}}
    assert sorted(p.name for p in folder.iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_prompts_are_masked_unless_the_plan_says_otherwise(folder):
    assert Plan.load(folder).prefill == "masked"
    make_plan(prefill="dense").save(folder)
    assert Plan.load(folder).prefill == "dense"
    with pytest.raises(PlanError, match="prefill: must be one of masked, dense, got 'sparse'"):
        make_plan(prefill="sparse")


def test_saving_again_replaces(folder):
    make_plan(budget=0.7).save(folder)
    assert Plan.load(folder).budget == 0.7


@pytest.mark.parametrize("key", ["prefill", "weights"])
def test_nothing_is_taken_for_granted(folder, key):
    rewrite(folder, lambda document: document.pop(key))
    with pytest.raises(PlanError, match=lacks(JSON_NAME, key)):
        Plan.load(folder)


def test_the_format_of_the_weights_is_kept(tmp_path):
    plan = dataclasses.replace(make_plan(), weights="int4:64")
    assert Plan.load(plan.save(tmp_path / "plan")).weights == "int4:64"
    with pytest.raises(PlanError, match=r"this plan is for int4 weights .*\(int4:64\), the model has .*\(int8:128\)"):
        plan.require_weights("int8:128")
    plan.require_weights("int4:64")


def test_an_unknown_format_of_weights_is_refused():
    with pytest.raises(PlanError, match="weights: must be none, int8 or int4"):
        dataclasses.replace(make_plan(), weights="fp8")


def test_the_json_is_for_people(folder):
    document = json.loads((folder / JSON_NAME).read_text())
    np.testing.assert_allclose(document["sparsities"], make_plan().sparsities, atol=5e-7)
    np.testing.assert_allclose(document["levels"], SHAPE.levels(make_plan().sparsities), atol=5e-7)
    assert document["projections"] == ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_truncated_json(folder, keep):
    path = folder / JSON_NAME
    text = path.read_bytes()
    path.write_bytes(text[: int(keep * len(text)) if keep == 0.5 else (keep if keep >= 0 else keep - 1)])
    with pytest.raises(PlanError, match=r"plan\.json: not valid JSON \(.*\); the plan is truncated or changed"):
        Plan.load(folder)


@pytest.mark.parametrize("drop", [1, 100])
def test_truncated_tensors(folder, drop):
    path = folder / TENSORS_NAME
    payload = path.read_bytes()
    path.write_bytes(payload[:-drop])
    match = rf"plan\.safetensors: {len(payload)} bytes expected, got {len(payload) - drop}; the plan is truncated"
    with pytest.raises(PlanError, match=match):
        Plan.load(folder)


def test_tensors_of_another_plan(folder):
    path = folder / TENSORS_NAME
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(PlanError, match=r"bytes expected, got .*; the plan is put together from two"):
        Plan.load(folder)


def test_a_file_in_place_of_the_folder(folder):
    with pytest.raises(PlanError, match=rf"plan\.json: is a file; a plan is a folder with .*; did you mean '{folder}'"):
        Plan.load(folder / JSON_NAME)


def test_a_changed_digit_of_the_json(folder):
    path = folder / JSON_NAME
    text = path.read_text()
    assert text.count('"budget": 0.6') == 1
    path.write_text(text.replace('"budget": 0.6', '"budget": 0.7'))
    with pytest.raises(PlanError, match=r"plan\.json: sha256 does not match its content; the plan was changed"):
        Plan.load(folder)


def test_a_changed_byte_of_the_tensors(folder):
    path = folder / TENSORS_NAME
    payload = bytearray(path.read_bytes())
    payload[-3] ^= 1
    path.write_bytes(payload)
    with pytest.raises(PlanError, match=r"plan\.safetensors: sha256 differs from plan\.json; the plan was changed"):
        Plan.load(folder)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([JSON_NAME, TENSORS_NAME]), st.integers(0, 10**9), st.integers(1, 255))
def test_any_changed_byte_is_refused_or_harmless(saved, name, position, mask):
    copy = saved.parent / "copy"
    shutil.copytree(saved, copy, dirs_exist_ok=True)
    payload = bytearray((copy / name).read_bytes())
    payload[position % len(payload)] ^= mask
    (copy / name).write_bytes(payload)
    try:
        found = Plan.load(copy)
    except PlanError:
        pass
    else:
        assert name == JSON_NAME  # white space between tokens
        assert same(found, make_plan())


@pytest.mark.parametrize("version", [0, 3, None, "1", True, [1]])
def test_another_schema_version(folder, version):
    rewrite(folder, lambda document: document.update(schema_version=version))
    with pytest.raises(
        PlanError, match=re.escape(f"schema_version must be 1 or 2, got {version!r}; export the plan again")
    ):
        Plan.load(folder)


def test_json_that_is_no_object(folder):
    (folder / JSON_NAME).write_text("[1]")
    with pytest.raises(PlanError, match="schema_version must be 1 or 2, got None"):
        Plan.load(folder)


def test_json_nested_without_end(folder):
    (folder / JSON_NAME).write_text("[" * 200_000)
    with pytest.raises(PlanError, match="not valid JSON"):
        Plan.load(folder)


def test_json_that_is_too_large(folder, monkeypatch):
    monkeypatch.setattr("was_search.plan._MAX_JSON_BYTES", 100)
    with pytest.raises(PlanError, match=r"plan\.json: larger than 100 bytes; a plan is a folder with"):
        Plan.load(folder)


@pytest.mark.parametrize("key", _ENTRIES)
def test_a_missing_entry(folder, key):
    rewrite(folder, lambda document: document.pop(key))
    with pytest.raises(PlanError, match=lacks(JSON_NAME, key)):
        Plan.load(folder)


@pytest.mark.parametrize(
    ("group", "key"), [("tensors", "bytes"), ("tensors", "sha256"), ("shape", "masks"), ("shape", "in_features")]
)
def test_a_missing_entry_further_in(folder, group, key):
    rewrite(folder, lambda document: document[group].pop(key))
    with pytest.raises(PlanError, match=lacks(JSON_NAME, key)):
        Plan.load(folder)


@pytest.mark.parametrize("name", ["sparsities", "thresholds", "norms.1.down"])
def test_a_missing_tensor(folder, name):
    tensors = load((folder / TENSORS_NAME).read_bytes())
    payload = save({key: value for key, value in tensors.items() if key != name})
    (folder / TENSORS_NAME).write_bytes(payload)
    declared = {"file": TENSORS_NAME, "sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)}
    rewrite(folder, lambda document: document.update(tensors=declared))
    with pytest.raises(PlanError, match=lacks(TENSORS_NAME, re.escape(name))):
        Plan.load(folder)


@pytest.mark.parametrize("name", ["scales.0.q", "constants.1.down"])
def test_a_plan_without_compensation_that_holds_one(folder, name):
    """Before, what scales and constants correct was left out in silence."""
    payload = save(load((folder / TENSORS_NAME).read_bytes()) | {name: np.ones(3, np.float32)})
    (folder / TENSORS_NAME).write_bytes(payload)
    declared = {"file": TENSORS_NAME, "sha256": hashlib.sha256(payload).hexdigest(), "bytes": len(payload)}
    rewrite(folder, lambda document: document.update(tensors=declared))
    with pytest.raises(PlanError, match=rf"has '{name}', which plans of its schema_version have not"):
        Plan.load(folder)


def test_a_pipe_is_no_plan_and_that_is_the_reason(folder):
    (folder / JSON_NAME).unlink()
    os.mkfifo(folder / JSON_NAME)
    with pytest.raises(PlanError, match=r"^\S*plan\.json: not a file; a plan is a folder with"):
        Plan.load(folder)


def test_the_page_describes_every_entry(folder):
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(json.loads((folder / JSON_NAME).read_text()))


def test_a_shape_that_does_not_fit_the_tensors(folder):
    def widen(document):
        document["shape"]["in_features"][1][6] = 6

    rewrite(folder, widen)
    with pytest.raises(PlanError, match="norms: one float32 array of in_features is needed for every projection"):
        Plan.load(folder)


def test_paths_that_are_no_plan(tmp_path, folder):
    file = tmp_path / "file"
    file.write_text("x")
    words = r"a plan is a folder with plan\.json and plan\.safetensors"
    with pytest.raises(PlanError, match=rf"file: is a file; {words}$"):
        Plan.load(file)
    with pytest.raises(PlanError, match=rf"plan\.json: cannot be read \(No such file or directory\); {words}"):
        Plan.load(tmp_path / "none")
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(PlanError, match=r"plan\.safetensors: not found; a plan is a folder with"):
        Plan.load(folder)


def test_a_folder_that_only_trying_tells_of():
    """Before, a whole run was made first: its permissions let a superuser write."""
    with pytest.raises(PlanError, match=r"plan: cannot write /proc/here/plan \(/proc.*\); choose another folder with"):
        require_writable(Path("/proc/here/plan"))


def test_saving_where_a_file_is(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(
            PlanError, match=rf"plan: cannot write {re.escape(str(path))} \(.*\); choose another folder"
        ):
            make_plan().save(path)
    assert file.read_text() == "mine"


def test_another_model():
    plan = make_plan()
    plan.require_model("f" * 64, SHAPE)
    match = rf"another model: plan ada/tiny {'f' * 64}, model at hand {'0' * 64}; export a plan for this"
    with pytest.raises(PlanError, match=match):
        plan.require_model("0" * 64, SHAPE)


def test_another_shape():
    plan = make_plan()
    plan.require_shape(SHAPE)
    with pytest.raises(PlanError, match="plan for 2 blocks, the model has 1"):
        plan.require_shape(ModelShape(SHAPE.in_features[:1], SHAPE.out_features[:1]))
    wider = dataclasses.replace(SHAPE, out_features=(SHAPE.out_features[0], (3, 1, 1, 3, 5, 6, 3)))
    for check in (plan.require_shape, lambda shape: plan.require_model("f" * 64, shape)):
        with pytest.raises(PlanError, match=r"block 1, up: plan for a \(5, 3\) weight, the model has \(6, 3\)"):
            check(wider)


@pytest.mark.parametrize("name", ["sparsities", "thresholds"])
def test_refuses_bad_arrays(name):
    with pytest.raises(PlanError, match=rf"{name}: shape must be \(2, 7\), got \(2, 6\)"):
        make_plan(**{name: np.zeros((2, 6))})
    for bad in (-0.1, np.nan, np.inf):
        value = np.full((2, 7), 0.5, np.float64 if name == "sparsities" else np.float32)
        value[1, 1] = bad
        with pytest.raises(PlanError, match=rf"{name}: must be finite and not negative, got"):
            make_plan(**{name: value})


def test_refuses_other_bad_values():
    with pytest.raises(PlanError, match=r"sparsities: must be under 1, got 1\.0"):
        make_plan(sparsities=np.full((2, 7), 1.0))
    with pytest.raises(PlanError, match="score: must be one of l1, l2, none, got 'l3'"):
        make_plan(score="l3")
    with pytest.raises(PlanError, match=r"dense_prefix: must not be negative, and under 2\^31, got -1"):
        make_plan(dense_prefix=-1)
    with pytest.raises(PlanError, match="norms: one float32 array of in_features is needed"):
        make_plan(norms=make_plan().norms[:1])
    for bad in (np.nan, np.inf, -1.0):
        norms = make_plan().norms
        broken = (norms[0], (*norms[1][:6], np.array([1, 1, bad, 1, 1], np.float32)))
        with pytest.raises(PlanError, match="norms: must be finite and not negative; the model's weights are damaged"):
            make_plan(norms=broken)


def test_figures_that_are_not_finite_are_null_in_the_file(tmp_path):
    """Standard JSON has no number for them; what is read is what was written, hash and all."""
    metrics = {"test": {"loss_nats": 705.0, "perplexity": math.inf}, "dense": {"test": {"loss_nats": math.nan}}}
    folder = make_plan(metrics=metrics, provenance={"step": [math.inf]}).save(tmp_path / "plan")
    text = (folder / JSON_NAME).read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    found = Plan.load(folder)
    assert found.metrics == {"test": {"loss_nats": 705.0, "perplexity": None}, "dense": {"test": {"loss_nats": None}}}
    assert found.provenance == {"step": [None]}
