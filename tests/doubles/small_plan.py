"""A plan for the small checkpoint that a few lines make, without a search."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tests.doubles.small_run import small_model
from tests.doubles.tiny_models import tiny_plan
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model, resolve_model
from was_search.service.steps.demonstration import demo_settings


def make_plan(folder: Path, weights: str = "none", data: str = "", **made: Any) -> Path:
    """A plan of 50 % with the demo's settings, or other ``data``; ``made`` is what :func:`tiny_plan` does otherwise."""
    settings = demo_settings(model=small_model())
    source = resolve_model(settings.model)
    plan = tiny_plan(load_model(source, dtype="float32", device="cpu", weights=weights), **made)
    short = {"sequence_length": 64, "test_sequences": 8}
    own = {name: made[name] for name in ("dense_prefix", "score", "masks") if name in made}
    provenance = {
        "settings": {"model": settings.model, "data": data or settings.data, **short, **own},
        "study": folder.name,
    }
    return dataclasses.replace(plan, fingerprint=fingerprint(source), provenance=provenance).save(folder)
