"""A search small enough for a test: some blocks of the packaged checkpoint on few and short sequences."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file

from was_search.service.settings import Settings
from was_search.service.steps.demonstration import DEMO_FOLDER, demo_settings
from was_search.studies.slots import Slot, SlotState
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

SMALL: dict[str, Any] = {
    "trials": 40,
    "sequence_length": 96,
    "calibration_sequences": 8,
    "pricing_sequences": 4,
    "greedy_sequences": 0,
    "search_sequences": 24,
    "test_sequences": 16,
    "seed_rounds": 0,
    "descent_epochs": 0,
    "slope_sequences": 16,
    "descent_rounds": 2,
    "descent_sequences": 4,
    "batch_size": 4,
    "compensation": "off",
}


BLOCKS = (0, 3, 4, 10)
"""Which of the packaged checkpoint's twelve blocks the small model has: time goes by their number, and of all choices
of four these still predict best."""


@cache
def small_model() -> str:
    """A checkpoint folder with :data:`BLOCKS` of the packaged model, which ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="was-small-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(DEMO_FOLDER / "model", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(BLOCKS)}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    for number, block in enumerate(BLOCKS):
        own = f"model.layers.{block}."
        kept |= {
            name.replace(own, f"model.layers.{number}."): tensors[name] for name in tensors if name.startswith(own)
        }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def small_settings(**overrides: Any) -> Settings:
    return demo_settings(**{**SMALL, "model": small_model(), **overrides})


@contextmanager
def coarse_greedy(step: float = 0.1) -> Iterator[None]:
    """The greedy table in steps of ``step`` instead of 1/80, for what runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("was_search.service.steps.seeding.GREEDY_STEP", step)
        yield


def small_flags(**overrides: Any) -> list[str]:
    """The same as command-line flags of ``was-search search``."""
    settings = small_settings(**overrides)
    names = [
        *(name for name in SMALL if name != "compensation"),
        "model",
        "data",
        "target",
        "workers",
        "ray",
        "device",
        "storage",
        "study",
    ]
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]


def environment() -> dict[str, str]:
    """For a child process: this source tree first, no other cluster's address."""
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**env, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def assert_each_finished_once(database: Database, study: str, n: int) -> list[Slot]:
    """n slots, all finished, and Optuna's trials agree with them one to one."""
    slots = StudyStore(database).slots(study)
    assert [slot.number for slot in slots] == list(range(n))
    assert all(slot.state.finished for slot in slots), [slot.state for slot in slots]
    trials = optuna.load_study(study_name=study, storage=database.optuna_storage()).trials
    assert sorted(trial._trial_id for trial in trials) == sorted(slot.trial_id for slot in slots)
    by_id = {trial._trial_id: trial for trial in trials}
    states = {
        SlotState.COMPLETE: TrialState.COMPLETE,
        SlotState.STOPPED: TrialState.PRUNED,
        SlotState.FAILED: TrialState.FAIL,
    }
    for slot in slots:
        trial = by_id[slot.trial_id]
        assert trial.state is states[slot.state]
        if slot.state is SlotState.COMPLETE:
            assert trial.value == slot.loss_nats
    return slots
