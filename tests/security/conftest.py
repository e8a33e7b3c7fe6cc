"""A Postgres over TCP with passwords, and logins of the owner's, a coordinator's and a reader's role."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.security.tcp_server import GuardedServer
from was_storage.server.database import Database
from was_storage.server.roles import COORDINATOR, READER, init_roles


@dataclass(frozen=True)
class Logins:
    """URLs with passwords."""

    server: GuardedServer
    owner: str
    coordinator: str
    reader: str


@pytest.fixture(scope="session")
def logins() -> Iterator[Logins]:
    """After ``was-search db init``."""
    folder = Path(tempfile.mkdtemp(prefix="was-security-"))
    server = GuardedServer(folder)
    try:
        with Database.open(server.owner) as database:
            init_roles(database)
        coordinator = server.add_login("searches", f"IN ROLE {COORDINATOR}")
        reader = server.add_login("looks", f"IN ROLE {READER}")
        yield Logins(server, server.owner, coordinator, reader)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def coordinator(logins: Logins) -> Iterator[Database]:
    with Database.open(logins.coordinator) as database:
        yield database
