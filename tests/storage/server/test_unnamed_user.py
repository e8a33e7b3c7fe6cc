"""The embedded server under a user id that has no name and no home, as in containers."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from tests.places.users import UNNAMED, needs_root, run_unnamed
from was_search.errors import StorageError
from was_storage.server import embedded, unnamed_user
from was_storage.server.embedded import EmbeddedServer, default_home

pytestmark = pytest.mark.postgres

IMPORTS = """
import psycopg2
import sqlalchemy.dialects.postgresql.psycopg2
from pathlib import Path
from sqlalchemy import create_engine, text
from was_search.errors import StorageError
from was_storage.server import postgres_binaries, unnamed_user
from was_storage.server.embedded import EmbeddedServer, default_home
postgres_binaries.bin_folder(Path("/nowhere"))
"""
START = """
try:
    for _ in range(2):
        with EmbeddedServer.start(default_home() / "postgres") as server:
            with create_engine(server.url()).connect() as connection:
                print(connection.execute(text("SELECT current_database()")).scalar())
except StorageError as error:
    print(error)
"""
WITHOUT = "unnamed_user._FOLDERS = ()\n"


def said(code: str, **environment: str) -> str:
    done = run_unnamed(IMPORTS, code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def owned(home: Path) -> str:
    home.mkdir()
    os.chown(home, UNNAMED, UNNAMED)
    return str(home)


@needs_root
@pytest.mark.skipif(unnamed_user._wrapper() is None, reason="no libnss_wrapper: apt-get install libnss-wrapper")
def test_it_starts_all_the_same(server_home: Path) -> None:
    assert said(START, WAS_SEARCH_HOME=owned(server_home / "unnamed")) == "was\nwas"


@needs_root
def test_without_a_wrapper_the_remedy_is_named(server_home: Path) -> None:
    words = said(WITHOUT + START, WAS_SEARCH_HOME=owned(server_home / "no wrapper"))
    assert f"user id {UNNAMED} has no entry in /etc/passwd" in words
    assert "install libnss-wrapper" in words
    assert "or give a URL" in words


@needs_root
def test_no_home_is_said() -> None:
    """No folder called "~" is made in the working directory."""
    homeless = "has no home folder and HOME is not set: set WAS_SEARCH_HOME"
    assert homeless in said(START)
    assert homeless in said(START, WAS_SEARCH_HOME="~/data")
    assert "set WAS_SEARCH_HOME to another folder" in said(START, HOME="/")  # what container engines set


def test_a_home_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WAS_SEARCH_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: UNNAMED)
    monkeypatch.setattr(embedded, "user_data_dir", lambda *_, **__: "~/.local/share/was-search")
    with pytest.raises(StorageError, match=f"user id {UNNAMED} has no home folder"):
        default_home()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError("none")))
    with pytest.raises(StorageError, match="has no home folder"):
        EmbeddedServer.start(Path("~/data"))


def test_a_name_is_lent_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with unnamed_user.named() as variables:
        assert variables == {}
    monkeypatch.setattr(unnamed_user, "_has_name", lambda _: False)
    monkeypatch.setattr(unnamed_user, "_FOLDERS", (str(tmp_path),))
    with pytest.raises(StorageError, match=r"no entry in /etc/passwd.*libnss-wrapper"), unnamed_user.named():
        pass
    (tmp_path / "libnss_wrapper.so").touch()
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    with unnamed_user.named() as variables:
        assert variables["LD_PRELOAD"] == f"{tmp_path}/libnss_wrapper.so /other.so"
        assert f":{os.geteuid()}:" in Path(variables["NSS_WRAPPER_PASSWD"]).read_text()
    assert not Path(variables["NSS_WRAPPER_PASSWD"]).exists()
