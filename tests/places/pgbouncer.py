"""A real PgBouncer in front of a Postgres, in whichever mode a site may run it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest

from tests.servers.ports import free_port
from was_storage.server import postgres_binaries

PROGRAM = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin")
needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer: apt-get install pgbouncer")


class PgBouncer:
    """The pooler, started; it lets ``postgres`` in without a password, to every database of the server.

    Args:
        folder: of its files.
        server: libpq's words for the server, such as ``host=/folder``.
        settings: of pgbouncer.ini, over those of a test.
    """

    def __init__(self, folder: Path, server: str, settings: dict[str, str]) -> None:
        self.port = free_port()
        self._account = postgres_binaries.server_account()
        self._settings = folder / "pgbouncer.ini"
        (folder / "users.txt").write_text('"postgres" ""\n')
        self._server = server
        self._folder = folder
        self.write(settings)
        folder.chmod(0o755)
        assert PROGRAM is not None
        self._process = subprocess.Popen(
            [PROGRAM, str(self._settings)],
            stdin=subprocess.DEVNULL,
            stdout=(folder / "pgbouncer.log").open("w"),
            stderr=subprocess.STDOUT,
            cwd="/",
            user=None if self._account is None else self._account.pw_uid,
        )
        self._wait()

    def write(self, settings: dict[str, str]) -> None:
        """The settings file; a running pooler takes it in by :meth:`reload`."""
        given = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(self._folder / "users.txt"),
            "admin_users": "postgres",
            **settings,
        }
        lines = [f"[databases]\n* = {self._server}\n[pgbouncer]", *(f"{key} = {value}" for key, value in given.items())]
        self._settings.write_text("\n".join(lines) + "\n")

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def command(self, words: str) -> list[tuple[object, ...]]:
        """Type ``words`` at its console, such as ``SHOW SERVERS``."""
        connection = psycopg2.connect(host="127.0.0.1", port=self.port, user="postgres", dbname="pgbouncer")
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(words)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + 30
        while True:
            try:
                self.command("SHOW VERSION")
                return
            except psycopg2.OperationalError:
                assert self._process.poll() is None, (self._folder / "pgbouncer.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)


@contextmanager
def pgbouncer(server: str, **settings: str) -> Iterator[PgBouncer]:
    """A pooler with these settings in front of ``server``."""
    folder = Path(tempfile.mkdtemp(prefix="was-pgbouncer-"))
    try:
        pooler = PgBouncer(folder, server, settings)
        try:
            yield pooler
        finally:
            pooler.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
