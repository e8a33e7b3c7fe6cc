"""Temporary folders whose paths leave room for a socket's name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from was_search.process import short_folders
from was_search.process.short_folders import folder_with_room, has_room, is_private


@pytest.mark.parametrize(
    ("folder", "n_bytes", "fits"),
    [
        ("/tmp", 103, True),
        ("/tmp", 104, False),
        ("/tmp/", 103, True),
        ("/" + "é" * 30, 46, True),  # 61 bytes
        ("/" + "é" * 30, 47, False),
    ],
)
def test_bytes_count_and_not_characters(folder: str, n_bytes: int, fits: bool) -> None:
    assert has_room(folder, n_bytes) is fits


def test_the_temporary_folder_comes_first_and_others_where_it_is_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = tmp_path / "s"
    short.mkdir()
    monkeypatch.setattr(short_folders, "SOCKET_BYTES", len(os.fsencode(short)) + 20)
    monkeypatch.setattr(short_folders, "_USUAL", ("/no/such", str(short)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert folder_with_room(20) == tmp_path
    long = tmp_path / ("x" * 40)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert folder_with_room(20) == short, "one that is not there is passed over"
    assert folder_with_room(21) is None


def test_a_folder_is_private_where_nobody_else_may_enter_it(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir(mode=0o700)
    link.symlink_to(folder)
    me = os.geteuid()
    assert is_private(folder, (me,))
    assert not is_private(link, (me,))
    assert not is_private(folder, (me + 1,))
    folder.chmod(0o710)
    assert not is_private(folder, (me,))
