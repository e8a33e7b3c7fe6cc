"""TLS to a real Postgres over TCP that takes no other connection: who is believed, who is refused, with which words."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from tests.doubles.small_study import finish, hand_out, new_study
from tests.security.certificates import Pair, authority, signed
from tests.security.conftest import Logins
from tests.security.tcp_server import OWNER, GuardedServer, password_of, programs_with_tls
from tests.servers.postgres import Tls
from tests.servers.ray_head import START_SECONDS, jobs_at
from tests.workers.test_jobs import head  # noqa: F401 - a fixture
from was_search.errors import StorageError
from was_search.service.cli.main import app
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.watching.machine_checks import _postgres
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer
from was_storage.server.urls import display_url, normalise_url
from was_storage.studies.store import StudyStore

PROGRAMS = programs_with_tls()

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(
        PROGRAMS is None, reason="no Postgres with TLS is installed (Debian: apt-get install postgresql)"
    ),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl is installed"),
]


@dataclass(frozen=True)
class Place:
    """A server with TLS, its CA and another one, and certificates of clients."""

    server: GuardedServer
    ca: Pair
    other: Pair
    client: Pair
    stranger: Pair

    def url(self, **arguments: object) -> str:
        query = "&".join(f"{name}={value}" for name, value in arguments.items())
        return f"{self.server.owner}?{query}" if query else self.server.owner

    def proved(self, **changes: object) -> str:
        """A URL with everything that is asked for."""
        right = {
            "sslmode": "verify-full",
            "sslrootcert": self.ca.certificate,
            "sslcert": self.client.certificate,
            "sslkey": self.client.key,
        }
        return self.url(**{**right, **changes})


def make(folder: Path, *, clients: bool, names: str) -> Place:
    ca, other = authority(folder, "our-ca"), authority(folder, "another-ca")
    server = signed(folder, "postgres.example", ca, alternative=names)
    client = signed(folder, OWNER, ca)
    stranger = signed(folder, "stranger", other)
    tls = Tls(server.certificate, server.key, ca.certificate if clients else None)
    return Place(GuardedServer(folder / "server", PROGRAMS, tls), ca, other, client, stranger)


@pytest.fixture(scope="module", params=[False, True], ids=["server's certificate", "both certificates"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="was-tls-"))
    folder.chmod(0o755)
    (folder / "server").mkdir()
    made = make(folder, clients=request.param, names="IP:127.0.0.1")
    try:
        yield made
    finally:
        made.server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def postgres_url(place: Place) -> str:
    """What the head of a Ray cluster has in its environment."""
    return place.proved()


def encryption(database: Database) -> str | None:
    query = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    with database.begin() as connection:
        return connection.execute(text(query)).scalar()


def test_the_right_authority_is_believed_by_coordinator_dashboard_and_optuna(place: Place) -> None:
    with Database.open(place.proved()) as database:
        assert str(encryption(database)).startswith("TLSv1.")
        record = new_study(database, 1)
        with StudyStore(database).coordinate(record.name) as session:
            attempt = hand_out(session, 0, "worker")
            finish(session, 0, attempt, SlotState.FAILED, error="x", worker="worker")
            held = "SELECT count(*) FROM pg_stat_activity a JOIN pg_stat_ssl s USING (pid) WHERE a.usename = :me AND {}"
            with database.begin() as connection:
                plain = connection.execute(text(held.format("NOT s.ssl")), {"me": OWNER}).scalar()
                safe = connection.execute(text(held.format("s.ssl")), {"me": OWNER}).scalar()
            assert plain == 0 and safe is not None and safe >= 2
        with database.read_only() as reading:
            assert str(encryption(reading)).startswith("TLSv1.")
            assert reading.optuna_storage().get_study_id_from_name(record.name) == record.optuna_study_id
        StudyStore(database).delete(record.name)


def test_libpqs_own_variables_serve_as_well(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(place.ca.certificate))
    monkeypatch.setenv("PGSSLCERT", str(place.client.certificate))
    monkeypatch.setenv("PGSSLKEY", str(place.client.key))
    with Database.open(place.url()) as database:
        assert encryption(database)
    monkeypatch.setenv("PGSSLROOTCERT", str(place.other.certificate))
    with pytest.raises(StorageError, match="not signed by an authority of sslrootcert"):
        Database.open(place.url())
    with Database.open(place.proved()) as database:  # what the URL says wins
        assert encryption(database)


def test_a_file_in_the_home_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place.ca.certificate.parent))
    with Database.open(place.proved(sslrootcert=f"~/{place.ca.certificate.name}")) as database:
        assert encryption(database)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sslrootcert": "{other}"}, "not signed by an authority of sslrootcert; give the CA that signed it"),
        ({"sslrootcert": "/no/such/ca.crt"}, "the file of sslrootcert .* cannot be read"),
        ({"sslmode": "disable"}, "does not allow this user, database or address .* try .sslmode=require"),
        ({"sslmode": "sometimes"}, "sslmode must be disable, allow, prefer, require, verify-ca or verify-full"),
        ({"sslkey": "/no/such.key"}, "the file of sslkey .* cannot be used"),
    ],
)
def test_what_is_wrong_is_said(place: Place, changes: dict[str, str], words: str) -> None:
    url = place.proved(**{name: value.format(other=place.other.certificate) for name, value in changes.items()})
    with pytest.raises(StorageError, match=words) as caught:
        Database.open(url)
    assert password_of(place.server.owner) not in str(caught.value)


def test_a_certificate_for_another_host(place: Place) -> None:
    url = place.proved().replace("@127.0.0.1", "@localhost")  # the same server, by a name that it did not prove
    with pytest.raises(StorageError, match="the server's certificate is for another host"):
        Database.open(url)
    with Database.open(url.replace("verify-full", "verify-ca")) as database:
        assert encryption(database)


def test_a_key_that_others_can_read(place: Place, tmp_path: Path) -> None:
    key = tmp_path / "open.key"
    shutil.copy(place.client.key, key)
    key.chmod(0o644)
    with pytest.raises(StorageError, match="readable by its owner only"):
        Database.open(place.proved(sslkey=key))


def test_a_client_that_proves_nothing(place: Place, request: pytest.FixtureRequest) -> None:
    nothing = place.url(sslmode="verify-full", sslrootcert=place.ca.certificate)
    if "both" not in request.node.callspec.id:
        with Database.open(nothing) as database:
            assert encryption(database)
        return
    with pytest.raises(StorageError, match="asks for a certificate; give sslcert and sslkey"):
        Database.open(nothing)
    with pytest.raises(StorageError):
        Database.open(place.proved(sslcert=place.stranger.certificate, sslkey=place.stranger.key))


def test_commands_take_it_by_flag_and_environment(place: Place) -> None:
    for arguments, env in (
        (["studies", "--json", "--storage", place.proved()], {}),
        (["studies", "--json"], {"WAS_SEARCH_STORAGE": place.proved()}),
    ):
        result = CliRunner().invoke(app, arguments, env=env)
        assert result.exit_code == 0, result.output
        assert json.loads(result.output)["event"] == "result"


def test_doctor_says_how_it_is_connected(place: Place, postgres_server: EmbeddedServer) -> None:
    with Context(Settings(storage=place.proved())) as context:
        assert ", TLSv1." in _postgres(context.database).found
    with Context(Settings(storage=postgres_server.url())) as context:  # a socket needs none
        assert "TLS" not in _postgres(context.database).found and "encrypted" not in _postgres(context.database).found


def test_doctor_says_that_nothing_is_encrypted(logins: Logins) -> None:
    with Context(Settings(storage=logins.owner)) as context:
        assert _postgres(context.database).found.endswith(", not encrypted")


def test_nothing_but_the_password_is_hidden_from_people(place: Place) -> None:
    shown = display_url(place.proved())
    assert f"sslrootcert={place.ca.certificate}" in normalise_url(place.proved()).replace("%2F", "/")
    assert "sslmode=verify-full" in shown and "our-ca.crt" in shown
    assert password_of(place.server.owner) not in shown


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_connects_as_its_head_says(head: str, request: pytest.FixtureRequest) -> None:  # noqa: F811
    if "both" not in request.node.callspec.id:
        pytest.skip("once is enough")
    client = jobs_at(head)
    lines: list[str] = []
    job = client.submit(["doctor", "--ray", "auto", "--json"], patience_seconds=START_SECONDS)
    assert client.follow(job, lines.append) == "SUCCEEDED", "".join(lines)
    assert ", TLSv1." in "".join(lines)
    password = password_of(request.getfixturevalue("postgres_url"))
    assert password not in "".join(lines)
    told = client._client.get_job_info(job)
    assert password not in f"{told.entrypoint} {told.runtime_env} {told.metadata} {told.message}"
    assert password not in client._client.get_job_logs(job)
