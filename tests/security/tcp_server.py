"""A Postgres on a TCP port where every login has a password that URLs must quote; its log tells all statements."""

from __future__ import annotations

import secrets
from pathlib import Path

from sqlalchemy import make_url

from tests.servers.postgres import TcpServer, Tls

OWNER, DATABASE = "owner", "searches"


def programs_with_tls() -> Path | None:
    """The folder of a Postgres that knows TLS, as Debian's does and the bundled one does not; None if there is none."""
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


class GuardedServer(TcpServer):
    """The server, with a database whose ``owner`` may make roles; stopped by :meth:`stop`.

    Args:
        folder: of data and log.
        programs: of Postgres; None for the bundled ones.
        tls: then nobody connects without.
    """

    def __init__(self, folder: Path, programs: Path | None = None, tls: Tls | None = None) -> None:
        super().__init__(folder, programs=programs, tls=tls, settings={"log_statement": "all"})
        self.owner = self.add_login(OWNER, "CREATEROLE")
        self.as_superuser(f"CREATE DATABASE {DATABASE} OWNER {OWNER}")

    def add_login(self, name: str, options: str = "") -> str:
        """A new login's URL."""
        password = f"p:w/{secrets.token_hex(8)}@%?#ü"
        quoted = password.replace(":", "\\:")
        self.as_superuser(f"CREATE ROLE {name} LOGIN PASSWORD '{quoted}' {options}")
        return self.url(name, password)

    def url(self, user: str, password: str) -> str:
        url = make_url(f"postgresql://127.0.0.1:{self.port}/{DATABASE}").set(username=user, password=password)
        return url.render_as_string(hide_password=False)


def password_of(url: str) -> str:
    """In plain."""
    return str(make_url(url).password)
