"""What doctor says beforehand of a model, a text, and the surroundings of a process."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scripts.make_random_model import make_random_model
from was_search.process import short_folders
from was_search.service.cli.main import app
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.watching import input_checks
from was_search.service.watching.check import Check

SMALL = {"sequence_length": 16, "calibration_sequences": 4, "search_sequences": 4, "test_sequences": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("made") / "tiny", "tiny")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven\n" * 300)
    return path


def found(model: Path, data: Path | str = "", **changes: object) -> dict[str, Check]:
    given = {"model": str(model), "data": str(data), "device": "cpu", **SMALL, **changes}
    with Context(Settings(**given)) as context:
        return {check.name: check for check in input_checks.check_inputs(context)}


def test_a_model_and_a_text_that_will_do(folder, text):
    checks = found(folder, text)
    assert list(checks) == ["model", "memory", "calibration text", "search text", "test text"]
    assert all(check.good for check in checks.values()), checks
    assert "4 x 16 tokens" in checks["test text"].found


def test_without_a_model_nothing_is_looked_at(text):
    with Context(Settings(data=str(text), **SMALL)) as context:
        assert list(input_checks.check_inputs(context)) == []


def test_without_data_the_model_alone(folder):
    assert list(found(folder)) == ["model", "memory"]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "damaged or truncated"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "has no tokenizer that can be read"),
        (lambda folder: (folder / "generation_config.json").write_text("[]"), "must hold a JSON object"),
        (shutil.rmtree, "model: "),
    ],
)
def test_a_model_that_will_not_load(folder, text, spoil, words):
    spoil(folder)
    checks = found(folder, text)
    assert list(checks) == ["model"]
    assert checks["model"].good is False and words in checks["model"].advice


def test_sequences_beyond_the_models_positions(folder):
    assert "sequence_length: must be at most" in found(folder, sequence_length=100_000)["model"].advice


def test_a_text_that_is_too_short_or_missing(folder, tmp_path):
    (tmp_path / "short.txt").write_text("one two")
    for data in ("short.txt", "missing.txt"):
        checks = found(folder, tmp_path / data)
        assert checks["memory"].good and checks["test text"].good is False
        assert checks["test text"].advice.startswith("data: ")


def test_fewer_sequences_than_were_asked_for(folder, text):
    check = found(folder, text, test_sequences=10_000)["test text"]
    assert check.good and "10000 sequences were asked for" in check.found


def test_token_ids_beyond_the_rows(folder, text, monkeypatch):
    from was_search.service.model import Model

    monkeypatch.setattr(Model, "token_rows", 3)
    check = found(folder, text)["search text"]
    assert check.good is False and "rows" in check.advice


def test_memory_that_is_too_small_for_the_workers(folder, monkeypatch):
    monkeypatch.setattr(input_checks, "_free", lambda: 1000)
    check = found(folder)["memory"]
    assert check.good is False and "fewer --workers" in check.advice


def test_free_memory_is_the_containers_where_it_has_a_limit(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2000 kB\n")
    assert input_checks._free(tmp_path / "meminfo", tmp_path) == 2000 * 1024
    (tmp_path / "memory.current").write_text("400")
    for limit, free in (("max", 2000 * 1024), ("1000", 600)):
        (tmp_path / "memory.max").write_text(limit)
        assert input_checks._free(tmp_path / "meminfo", tmp_path) == free


def surroundings(**settings: object) -> dict[str, Check]:
    with Context(Settings(**settings)) as context:
        return {check.name: check for check in input_checks.surroundings(context)}


@pytest.mark.parametrize(("encoding", "good"), [("utf-8", True), ("latin-1", None), ("ascii", None)])
def test_the_encoding_of_the_output(monkeypatch, encoding, good):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert surroundings()["output"].good is good


LONG = "/" + "x" * 66


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TMPDIR": "/tmp"}, "in /tmp/ray"),
        ({"TMPDIR": LONG}, f"/ray, as {LONG}/ray is too long a path"),
        ({"TMPDIR": LONG, "RAY_TMPDIR": "/tmp/"}, "in /tmp/ray"),
    ],
)
def test_where_rays_sockets_will_be(monkeypatch, variables, words):
    for name in ("TMPDIR", "RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = surroundings()["Ray's sockets"]
    assert check.good and words in check.found
    assert "Ray's sockets" not in surroundings(ray="10.0.0.1:6379")  # the cluster has its own
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "Ray's sockets" not in surroundings()


def test_no_folder_has_room_for_rays_sockets(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(short_folders, "SOCKET_BYTES", 60)
    check = surroundings()["Ray's sockets"]
    assert check.good is False and "set RAY_TMPDIR to a short one" in check.advice


def test_the_command_shows_it_and_ends_with_an_error(folder, text):
    given = ["doctor", "--no-services", "--model", str(folder), "--device", "cpu", "--sequence-length", "16", "--json"]
    done = CliRunner().invoke(app, [*given, "--data", str(text) + "x"])
    checks = {check["name"]: check for check in json.loads(done.output.splitlines()[-1])["checks"]}
    assert done.exit_code == 1
    assert checks["model"]["good"] and checks["test text"]["good"] is False
