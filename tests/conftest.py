"""Fixtures shared by all tests: a real Postgres for those marked ``postgres``, and what a terminal is for others."""

from __future__ import annotations

import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from was_storage.database import Database
from was_storage.embedded import EmbeddedServer

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture
def hang_ups_count() -> Iterator[None]:
    """SIGHUP does what it does in a terminal, though these tests may run under nohup, which children inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def server_home() -> Iterator[Path]:
    """A folder that the server's own account may enter: pytest's are private, and Postgres refuses root."""
    home = Path(tempfile.mkdtemp(prefix="was-test-"))
    home.chmod(0o755)
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(server_home: Path) -> Iterator[EmbeddedServer]:
    """The session's embedded Postgres."""
    with EmbeddedServer.start(server_home / "postgres") as server:
        engine = create_engine(server.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:  # no test cuts the power: do not wait for the disk
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
            connection.execute(text("SELECT pg_reload_conf()"))
        yield server


@pytest.fixture(scope="module")
def postgres_url(postgres_server: EmbeddedServer) -> str:
    """URL of a database made for this test module."""
    return postgres_server.url(f"test_{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[Database]:
    """The module's database, open and migrated."""
    with Database.open(postgres_url) as opened:
        yield opened
