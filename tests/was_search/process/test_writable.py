"""Places that nothing can be written to are known before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from was_search.process.writable import unwritable


def test_a_folder_that_is_there_or_would_be_made_leaves_no_trace(tmp_path: Path) -> None:
    assert unwritable(tmp_path) == unwritable(tmp_path / "a" / "b") == ""
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert unwritable(tmp_path / "file" / "b") == f"{tmp_path / 'file'} is not a folder"


def test_a_special_file_system() -> None:
    """Its permissions let a superuser write."""
    assert unwritable(Path("/proc/here/plan")).startswith("/proc")


def test_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: Any) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert unwritable(tmp_path / "plan") == f"{tmp_path}: Disk quota exceeded"
