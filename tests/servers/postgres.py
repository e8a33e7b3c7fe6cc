"""A Postgres of a test's own on a TCP port of loopback, with TLS if asked for; embedded ones that spare the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.servers.ports import free_port
from was_storage.server import postgres_binaries
from was_storage.server.embedded import EmbeddedServer


def spare_the_disk(server: EmbeddedServer, *, killed: bool = False) -> None:
    """It waits for no disk from now on, started again or not: no test cuts the power.

    Where it is ``killed`` what was committed is still handed to the system, which keeps it.
    """
    settings = ["fsync"] if killed else ["fsync", "synchronous_commit", "full_page_writes"]
    engine = create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        for setting in settings:
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))


@dataclass(frozen=True)
class Tls:
    """Files of a server's TLS; ``client_ca`` also asks clients for a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


class TcpServer:
    """The server, started; on its socket, in its data folder, ``postgres`` needs no password.

    Args:
        folder: of data and log; the server's account must be able to enter it.
        programs: of Postgres; None for the bundled ones.
        tls: then nobody connects without.
        listen: ``listen_addresses`` of postgresql.conf.
        host_rule: the line of pg_hba.conf for TCP; None for passwords, with ``tls`` those of TLS.
        settings: more of postgresql.conf.
    """

    def __init__(
        self,
        folder: Path,
        *,
        programs: Path | None = None,
        tls: Tls | None = None,
        listen: str = "127.0.0.1",
        host_rule: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.log = folder / "postgres.log"
        self.data = folder / "postgres"
        self.programs = programs or postgres_binaries.bin_folder(self.data)
        self._account = postgres_binaries.server_account()
        self._initialise(bundled=programs is None)
        if tls is not None:
            self._copy(tls)
        rule = host_rule or _rule(tls)
        (self.data / "pg_hba.conf").write_text(f"local all postgres trust\n{rule}\n", encoding="utf-8")
        lines = {
            "listen_addresses": f"'{listen}'",
            "port": str(self.port),
            "unix_socket_directories": f"'{self.data}'",
            "unix_socket_permissions": "0700",
            "fsync": "off",  # nothing here cuts the power: what was written reaches the disk without waiting for it
            **({"ssl": "on"} if tls else {}),
            **({"ssl_ca_file": "'ca.crt'"} if tls and tls.client_ca else {}),
            **(settings or {}),
        }
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write("\n" + "".join(f"{name} = {value}\n" for name, value in lines.items()))
        self.log.touch()
        postgres_binaries.hand_over(self.log, self._account)
        self.start()

    @property
    def pid(self) -> int:
        return int((self.data / "postmaster.pid").read_text().splitlines()[0])

    def start(self) -> None:
        self._control("start", "-l", str(self.log))

    def stop(self, mode: str = "fast") -> None:
        """``fast`` rolls back and ends sessions; ``immediate`` is a crash, which recovery follows."""
        self._control("stop", "-m", mode)

    def as_superuser(self, *statements: str) -> None:
        admin = f"postgresql+psycopg2://postgres@/postgres?host={self.data}&port={self.port}"
        engine = create_engine(admin, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def _initialise(self, bundled: bool) -> None:
        self.data.parent.chmod(0o755)
        if bundled:
            postgres_binaries.initialise(self.data, self._account)
            return
        self.data.mkdir(mode=0o700)
        postgres_binaries.hand_over(self.data, self._account)
        arguments = ["--auth=trust", "--encoding=UTF8", "--no-locale", "-U", "postgres", "-D", str(self.data)]
        postgres_binaries.run(self.programs / "initdb", arguments, self._account)

    def _copy(self, tls: Tls) -> None:
        for name, path in (("server.crt", tls.certificate), ("server.key", tls.key), ("ca.crt", tls.client_ca)):
            if path is not None:
                shutil.copy(path, self.data / name)
                os.chmod(self.data / name, 0o600)
                postgres_binaries.hand_over(self.data / name, self._account)

    def _control(self, action: str, *arguments: str) -> None:
        # A busy machine: pg_ctl's own minute is too short for a recovery there.
        arguments = (action, "-w", "-t", "300", "-D", str(self.data), *arguments)
        postgres_binaries.run(self.programs / "pg_ctl", arguments, self._account)


def _rule(tls: Tls | None) -> str:
    if tls is None:
        return "host all all 127.0.0.1/32 scram-sha-256"
    return "hostssl all all 127.0.0.1/32 scram-sha-256" + (" clientcert=verify-full" if tls.client_ca else "")
