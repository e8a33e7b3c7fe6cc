"""Files that people name are read where they are files, and refused where reading would wait or never end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from was_search.process.regular_files import IrregularFileError, read_regular


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, _socket, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/")]
)
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "x"
    make(path)
    with pytest.raises(OSError, match=r"\[Errno (22|6)\] (not a file|No such device or address)"):
        read_regular(path, 1000)


def test_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 1000) == b"x" * 1000
    with pytest.raises(IrregularFileError, match=r"larger than 999 bytes: '.*link'"):
        read_regular(tmp_path / "link", 999)
