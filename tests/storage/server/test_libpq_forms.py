"""What ``psql`` opens on a real server, we open."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import text

from was_search.errors import StorageError
from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer

pytestmark = pytest.mark.postgres

SERVICE = (
    "[searches]\nhost={folder}\nuser=postgres\ndbname={name}\nconnect_timeout=7\napplication_name=of the service\n"
)


@pytest.fixture(scope="module")
def name(postgres_server: EmbeddedServer) -> str:
    made = f"forms_{uuid.uuid4().hex[:12]}"
    postgres_server.url(made)
    return made


FORMS: list[tuple[str, dict[str, str]]] = [
    ("postgresql://postgres@{quoted}/{name}", {}),
    ("postgresql://postgres@{quoted}:5432/{name}", {}),
    ("postgres://postgres@127.0.0.1:1,{quoted}:5432/{name}", {}),
    ("postgresql://postgres@{quoted}:1,{quoted}:5432/{name}?target_session_attrs=read-write", {}),
    ("postgresql:///{name}?user=postgres&host={folder}", {}),
    ("postgresql://postgres@/{name}?host=/nowhere,{folder}&port=5432", {}),
    ("host={folder} user=postgres dbname={name}", {}),
    ("postgresql:///?service=searches", {"PGSERVICEFILE": "{services}"}),
    ("service=searches", {"PGSERVICEFILE": "{services}"}),
    ("postgresql://", {"PGSERVICEFILE": "{services}", "PGSERVICE": "searches"}),
    ("postgresql://", {"PGHOST": "{folder}", "PGUSER": "postgres", "PGDATABASE": "{name}"}),
    ("postgresql:///{name}", {"PGHOST": "/nowhere,{folder}", "PGUSER": "postgres", "PGCONNECT_TIMEOUT": "9"}),
]


def opened_by_psql(url: str, environment: Mapping[str, str]) -> str:
    command = ["psql", "-X", "-A", "-t", "-c", "SELECT current_database()", url]
    done = subprocess.run(command, env={**environment, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("form", "variables"), FORMS)
def test_a_form(
    postgres_server: EmbeddedServer,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    variables: dict[str, str],
) -> None:
    folder = str(postgres_server.socket_folder)
    services = tmp_path / "services.conf"
    services.write_text(SERVICE.format(folder=folder, name=name))
    words = {"folder": folder, "quoted": quote(folder, safe=""), "name": name, "services": str(services)}
    url = form.format(**words)
    given = {key: value.format(**words) for key, value in variables.items()}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    if shutil.which("psql"):
        assert opened_by_psql(url, given) == name
    with Database.open(url) as database:
        database.optuna_storage()
        with database.begin() as connection:
            asked = connection.execute(text("SELECT current_database(), current_setting('application_name')")).one()
    assert asked[0] == name
    assert asked[1] == "of the service" if "PGSERVICEFILE" in variables else asked[1].startswith("was-search ")


def test_a_service_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "none.conf"))
    with pytest.raises(StorageError, match="PGSERVICEFILE"):
        Database.open("service=searches")
    (tmp_path / "none.conf").write_text("[other]\nhost=h\n")
    with pytest.raises(StorageError, match=r"the service is not described .*PGSERVICEFILE"):
        Database.open("service=searches")
    (tmp_path / "none.conf").write_text("[searches]\nhos=h\n")
    with pytest.raises(StorageError, match="PGSERVICEFILE"):
        Database.open("service=searches")
