from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from was_search.errors import ConfigError, ModelError, WasError
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.service.settings import Settings
from was_search.service.steps.demonstration import DEMO_FOLDER, demo_settings
from was_search.service.steps.exporting import export
from was_search.service.steps.profiling import profile
from was_search.service.steps.seeding import seed
from was_search.service.steps.study import search
from was_search.service.targets.several import run_targets
from was_search.service.token_sets import tokens_here
from was_search.service.watching.control import change
from was_search.studies.control import Overrides


def test_what_is_opened_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pick(wanted: str) -> str:
        asked.append(wanted)
        return "cpu"

    monkeypatch.setattr("was_search.checkpoints.load.pick_device", pick)
    context = Context(Settings(dtype="float32"))
    assert context.placement_here is context.placement_here
    assert asked == ["auto"]


def test_what_was_opened_is_closed_at_the_end() -> None:
    closed = []
    with Context(Settings()) as context:
        context._stack.callback(lambda: closed.append(True))
        assert not closed
    assert closed == [True]


SERVICES = {"database", "cache", "cluster", "pool"}


@pytest.mark.parametrize("step", [seed, search, export, run_targets])
@pytest.mark.parametrize("study", ["", "named"])
def test_missing_text_is_said_before_anything_is_opened(step: Callable[..., Any], study: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    several = {"target": Settings().target, "targets": "0.4,0.5"} if step is run_targets else {}
    with Context(demo_settings(data=missing, study=study, kl_top_k=4000, **several)) as context:
        with pytest.raises(WasError, match=missing):
            step(context)
        assert not SERVICES & vars(context).keys()


def test_wrong_options_are_said_before_anything_is_opened() -> None:
    context = Context(Settings())
    with pytest.raises(ConfigError, match="rows: must be at least 1"):
        profile(context, rows=0)
    with pytest.raises(ConfigError, match="set: nothing to change"):
        change(context, "a study", Overrides())
    assert not {*SERVICES, "model"} & vars(context).keys()


class Told(Reporter):
    """Keeps the names of what may last."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def phase(self, name: str, *args: Any, least_seconds: float = 0.0, **options: Any) -> Iterator[Any]:
        assert least_seconds == 5.0
        self.names.append(name)
        yield lambda: None


def test_what_reads_or_fetches_much_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, minutes without a word: a fingerprint reads all weights, the hub and its data sets are far away."""
    with Context(demo_settings(), told := Told()) as context:
        tokens_here(context, "test")
        assert context.model.fingerprint
    data = context.settings.data
    assert told.names == [
        f"read {data} [test]",
        f"tokenise {Path(data).name} [test]",
        "read the weights of model for their fingerprint",
    ]
    here = context.model.source
    monkeypatch.setattr("was_search.checkpoints.load.resolve_model", lambda name, revision: here)
    monkeypatch.setattr("was_search.texts.named._load", lambda name, split, root: "some words of text\n" * 60)
    with Context(demo_settings(model="org/model", data="wikitext2"), told := Told()) as context:
        tokens_here(context, "test")
    assert told.names == ["load wikitext2 [test]", "fetch org/model from the hub", "tokenise wikitext2 [test]"]


class Pool:
    """Stands for the workers' pool: says what becomes of it."""

    told: list[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        self.told.append("pool started")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.told.append("pool closed")

    def wait_for_least(self) -> None:
        self.told.append("waited")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a context does with Ray and with workers, none of which are there."""
    told: list[str] = []

    @contextmanager
    def connect(*args: Any, **options: Any) -> Iterator[Any]:
        told.append("Ray started")
        yield SimpleNamespace(local=True)
        told.append("Ray closed")

    monkeypatch.setattr("was_workers.cluster.connect", connect)
    monkeypatch.setattr("was_workers.pool.Pool", type("Told", (Pool,), {"told": told}))
    return told


def test_the_model_is_checked_while_workers_start(told: list[str]) -> None:
    with Context(demo_settings()) as context:
        assert context.pool is not None
    assert told == ["Ray started", "pool started", "waited", "pool closed", "Ray closed"]


def test_a_model_that_no_worker_would_load_leaves_nothing_running(told: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_FOLDER / "model", folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 4000}))
    with Context(demo_settings(model=str(folder))) as context:
        with pytest.raises(ModelError, match="4000 layers"):
            _ = context.pool
        assert "pool" not in vars(context)
    assert told == ["Ray started", "pool started", "pool closed", "Ray closed"]
