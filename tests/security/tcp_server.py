"""A Postgres of our own on a TCP port, where every login has a password; with TLS if asked for."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from tests.chaos.cluster import free_port
from was_storage import postgres_binaries

OWNER, DATABASE = "owner", "searches"


def programs_with_tls() -> Path | None:
    """The folder of a Postgres that knows TLS, as Debian's does and the bundled one does not; None if there is none."""
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@dataclass(frozen=True)
class Tls:
    """Files of a server's TLS; ``client_ca`` also asks clients for a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


class TcpServer:
    """The server, stopped by :meth:`stop`; passwords hold characters that URLs must quote.

    Args:
        folder: of data and log; the server's account must be able to enter it.
        programs: of Postgres; None for the bundled ones.
        tls: then nobody connects without.
    """

    def __init__(self, folder: Path, programs: Path | None = None, tls: Tls | None = None) -> None:
        self.port = free_port()
        self.log = folder / "postgres.log"
        self._account = postgres_binaries.server_account()
        self._data = folder / "data"
        self._programs = programs or postgres_binaries.bin_folder(self._data)
        folder.chmod(0o755)
        self._data.mkdir(mode=0o700)
        postgres_binaries.hand_over(self._data, self._account)
        initial = ["--auth=trust", "--encoding=UTF8", "--no-locale", "-U", "postgres", "-D", str(self._data)]
        postgres_binaries.run(self._programs / "initdb", initial, self._account)
        kind, ask = ("hostssl", " clientcert=verify-full" if tls and tls.client_ca else "") if tls else ("host", "")
        (self._data / "pg_hba.conf").write_text(
            f"local all postgres trust\n{kind} all all 127.0.0.1/32 scram-sha-256{ask}\n", encoding="utf-8"
        )
        lines = [
            "listen_addresses = '127.0.0.1'",
            f"port = {self.port}",
            f"unix_socket_directories = '{self._data}'",
            "fsync = off",
            "log_statement = all",
        ]
        if tls is not None:
            for name, path in (("server.crt", tls.certificate), ("server.key", tls.key), ("ca.crt", tls.client_ca)):
                if path is not None:
                    shutil.copy(path, self._data / name)
                    os.chmod(self._data / name, 0o600)
                    postgres_binaries.hand_over(self._data / name, self._account)
            lines += ["ssl = on"] + (["ssl_ca_file = 'ca.crt'"] if tls.client_ca else [])
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")
        self.log.touch()
        postgres_binaries.hand_over(self.log, self._account)
        self._control("start", "-l", str(self.log))
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

    def as_superuser(self, statement: str) -> None:
        admin = f"postgresql+psycopg2://postgres@/postgres?host={self._data}&port={self.port}"
        engine = create_engine(admin, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))

    def stop(self) -> None:
        self._control("stop", "-m", "fast")

    def _control(self, action: str, *arguments: str) -> None:
        postgres_binaries.run(
            self._programs / "pg_ctl", [action, "-w", "-D", str(self._data), *arguments], self._account
        )


def password_of(url: str) -> str:
    """In plain."""
    return str(make_url(url).password)
