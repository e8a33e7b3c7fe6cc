"""The plan of a checkpoint that is given by name: a folder, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import hub

from was_kernels.runtime.plan_files import plan_folder
from was_search.errors import PlanError


def test_a_folder_is_where_its_plan_lies(tmp_path):
    assert plan_folder(str(tmp_path)) == tmp_path


def test_from_the_hub_both_files_are_fetched(tmp_path, monkeypatch):
    fetched: list[tuple[str, str, str | None]] = []

    def cached_file(name: str, file: str, *, revision: str | None) -> str:
        fetched.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(hub, "cached_file", cached_file)
    assert plan_folder("someone/something", "main") == tmp_path
    assert fetched == [("someone/something", file, "main") for file in ("plan.json", "plan.safetensors")]


def test_a_repository_without_a_plan_is_refused(monkeypatch):
    def cached_file(*_: object, **__: object) -> Path:
        raise OSError("there is no such file")

    monkeypatch.setattr(hub, "cached_file", cached_file)
    with pytest.raises(PlanError, match=r"^someone/something: plan\.json cannot be had, .*\(there is no such file\)$"):
        plan_folder("someone/something")
