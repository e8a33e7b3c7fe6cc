"""Plans from a stranger: links, pipes, devices, hostile headers, wrong arrays, settings that lead elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.security.bounded import bounded
from was_search.errors import PlanError
from was_search.plan import JSON_NAME, TENSORS_NAME, Plan, _document_hash
from was_search.service.cli.plan import load_plan
from was_search.shape import ModelShape

SHAPE = ModelShape(((3, 3, 3, 3, 3, 3, 5),) * 2, ((3, 1, 1, 3, 5, 5, 3),) * 2)


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "model": "tiny",
        "revision": "",
        "fingerprint": "a" * 64,
        "shape": SHAPE,
        "score": "l2",
        "budget": 0.5,
        "dense_prefix": 1,
        "sparsities": np.full((2, 7), 0.5),
        "thresholds": np.ones((2, 7), np.float32),
        "norms": tuple(tuple(np.ones(w, np.float32) for w in row) for row in SHAPE.in_features),
    }
    return Plan(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_plan().save(tmp_path / "plan")


def rewrite(folder: Path, payload: bytes | None = None, **values: Any) -> None:
    """A plan whose hashes fit, as whoever makes a hostile one would see to."""
    document = json.loads((folder / JSON_NAME).read_text())
    if payload is not None:
        (folder / TENSORS_NAME).write_bytes(payload)
        document["tensors"].update(bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest())
    document.update(values)
    document["sha256"] = _document_hash(document)
    (folder / JSON_NAME).write_text(json.dumps(document))


def refusal(folder: Path) -> str:
    """The message of loading ``folder``, which may neither hang nor take memory."""
    with bounded(), pytest.raises(PlanError) as caught:
        Plan.load(folder)
    assert not isinstance(caught.value.__cause__, MemoryError | TimeoutError)
    return str(caught.value)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_what_would_never_end_is_refused(folder: Path, name: str, what: str) -> None:
    if name == TENSORS_NAME:
        rewrite(folder, b"")  # a pipe and a device say that they have 0 bytes
    path = folder / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert f"{name}: not a file; a plan is a folder" in refusal(folder)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_a_file_of_a_terabyte_is_refused(folder: Path, name: str) -> None:
    document = json.loads((folder / JSON_NAME).read_text())
    document["tensors"]["bytes"] = 1 << 40
    document["sha256"] = _document_hash(document)
    (folder / JSON_NAME).write_text(json.dumps(document))
    with (folder / name).open("ab") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert "larger than" in refusal(folder)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_a_link_to_a_secret_tells_nothing_of_it(folder: Path, name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("sesame opens the door")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(PlanError) as caught:
        Plan.load(folder)
    assert "sesame" not in str(caught.value)


def test_a_name_that_leads_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    outside = make_plan(thresholds=np.full((2, 7), 9.0, np.float32)).save(tmp_path / "outside")
    document = json.loads((folder / JSON_NAME).read_text())
    for name in ("../outside/plan.safetensors", str(outside / TENSORS_NAME)):
        rewrite(folder, tensors={**document["tensors"], "file": name})
        assert Plan.load(folder).thresholds.max() == 1.0


def test_names_of_tensors_that_look_like_paths(folder: Path) -> None:
    tensors = load((folder / TENSORS_NAME).read_bytes())
    rewrite(folder, save({**tensors, "../../outside": np.ones(3, np.float32)}))
    assert Plan.load(folder).budget == 0.5  # a name is a key, and unknown ones are not looked at
    tensors["../norms.0.q"] = tensors.pop("norms.0.q")
    rewrite(folder, save(tensors))
    with pytest.raises(PlanError, match=r"has no 'norms\.0\.q'"):
        Plan.load(folder)


def test_writing_follows_no_link(tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    folder.mkdir()
    victims = {}
    for name in (JSON_NAME, TENSORS_NAME, f".{JSON_NAME}.tmp", f".{TENSORS_NAME}.tmp"):
        victims[name] = tmp_path / f"victim-{name}"
        victims[name].write_text("mine")
        (folder / name).symlink_to(victims[name])
    make_plan().save(folder)
    assert {path.read_text() for path in victims.values()} == {"mine"}
    assert not (folder / JSON_NAME).is_symlink()
    assert Plan.load(folder).budget == 0.5
    assert sorted(p.name for p in folder.iterdir() if not p.is_symlink()) == [JSON_NAME, TENSORS_NAME]


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


ENTRY = {"dtype": "F32", "shape": [2, 7], "data_offsets": [0, 56]}


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(header(b"{}", 2**63), id="longer than memory"),
        pytest.param(header(b"{}", 2**64 - 1), id="length -1"),
        pytest.param(header(b"{" * 10_000), id="nested"),
        pytest.param(header(b" " * (1 << 20) + b"{}"), id="a megabyte of blanks"),
        pytest.param(header(b"\xff\xfe{}"), id="no text"),
        pytest.param(
            header(json.dumps({"thresholds": {**ENTRY, "shape": [2**31, 2**31]}}).encode()), id="absurd shape"
        ),
        pytest.param(
            header(json.dumps({"thresholds": {**ENTRY, "shape": [2**40, 2**40]}}).encode()), id="shape that overflows"
        ),
        pytest.param(header(json.dumps({"thresholds": {**ENTRY, "data_offsets": [0, 2**50]}}).encode()), id="far end"),
        pytest.param(header(json.dumps({"thresholds": {**ENTRY, "data_offsets": [56, 0]}}).encode()), id="backwards"),
        pytest.param(header(json.dumps({"thresholds": {**ENTRY, "shape": [-2, -7]}}).encode()), id="negative shape"),
        pytest.param(
            header(json.dumps({"thresholds": ENTRY, "norms.0.q": ENTRY}).encode()) + bytes(56), id="overlapping"
        ),
        pytest.param(header(json.dumps({"thresholds": {**ENTRY, "dtype": "PICKLE"}}).encode()), id="unknown dtype"),
        pytest.param(b"\x80\x04\x95" + b"cos\nsystem\n(S'false'\ntR.", id="a pickle"),
    ],
)
def test_a_hostile_header(folder: Path, payload: bytes) -> None:
    rewrite(folder, payload)
    assert "export it again" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("thresholds", np.ones((2, 7)), "must be float32, got float64"),
        ("thresholds", np.ones((2, 7), np.int32), "must be float32, got int32"),
        ("thresholds", np.ones((7, 2), np.float32), r"shape must be \(2, 7\), got \(7, 2\)"),
        ("thresholds", np.full((2, 7), np.nan, np.float32), "must be finite"),
        ("sparsities", np.full((2, 7), 0.5, np.float16), "must be float64, got float16"),
        ("sparsities", np.full((2, 7), 1e300), "must be under 1"),
        ("norms.0.down", np.ones(3, np.float32), "one float32 array of in_features"),
        ("norms.0.q", np.ones(3), "one float32 array of in_features"),
        ("norms.0.q", np.ones((3, 1), np.float32), "one float32 array of in_features"),
        ("norms.1.up", -np.ones(3, np.float32), "must be finite and not negative"),
    ],
)
def test_wrong_arrays(folder: Path, name: str, value: np.ndarray, words: str) -> None:
    rewrite(folder, save({**load((folder / TENSORS_NAME).read_bytes()), name: value}))
    with pytest.raises(PlanError, match=words):
        Plan.load(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"budget": float("nan")}, r"budget: must be in \(0, 1\)"),
        ({"budget": 1e400}, r"budget: must be in \(0, 1\)"),
        ({"model": "\x1b]0;owned\x07\x1b[2J"}, "model: must be printable"),
        ({"revision": "a\nb"}, "revision: must be printable"),
        ({"fingerprint": "\x1b[31m"}, "fingerprint: must be 64 hexadecimal digits"),
        ({"score": ["l2"]}, "score: must be one of"),
        ({"shape": {"in_features": [[10**30] * 7], "out_features": [[1] * 7], "masks": "shared"}}, "shape must be"),
        ({"shape": {"in_features": [], "out_features": [], "masks": "shared"}}, "not a readable plan"),
        ({"dense_prefix": -1}, "must not be negative"),
        ({"dense_prefix": 10**400}, "not a readable plan|dense_prefix"),
        ({"tensors": []}, "has no 'sha256'"),
        ({"metrics": 7}, "not a readable plan"),
    ],
)
def test_wrong_values(folder: Path, values: dict[str, Any], words: str) -> None:
    rewrite(folder, **values)
    with pytest.raises(PlanError, match=words):
        Plan.load(folder)


def test_a_plan_leads_to_no_other_database_cluster_or_address(tmp_path: Path) -> None:
    settings = {
        "model": "org/model",
        "storage": "postgresql://a:b@evil/db",
        "ray": "evil:6379",
        "notify": "http://evil/x",
        "metrics": "0.0.0.0:9",
        "plan": "/etc",
        "study": "x",
        "workers": 4000,
        "batch_size": 2,
    }
    _, base = load_plan(make_plan(provenance={"settings": settings}).save(tmp_path / "plan"))
    assert base is not None
    assert (base.model, base.batch_size) == ("org/model", 2)
    assert (base.storage, base.ray, base.notify, base.metrics, base.plan) == ("embedded", "auto", "", "", "")
    assert (base.study, base.workers) == ("", 1)
    _, base = load_plan(make_plan(provenance={"settings": [1, 2]}).save(tmp_path / "other"))
    assert base is not None and base.model == ""
