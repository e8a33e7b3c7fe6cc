"""A role whose name is our schema's must not move Optuna's tables into it."""

from __future__ import annotations

import pytest
from sqlalchemy import inspect, text

from was_storage.server.database import Database
from was_storage.server.embedded import EmbeddedServer
from was_storage.server.urls import parse_url

pytestmark = pytest.mark.postgres


def test_optuna_tables_stay_in_public(postgres_server: EmbeddedServer) -> None:
    owner_url = postgres_server.url("search_path")
    with Database.open(postgres_server.url("search_path_roles")) as admin, admin.begin() as connection:
        connection.execute(text("CREATE ROLE was LOGIN SUPERUSER"))
    url = parse_url(owner_url).set(username="was").render_as_string(hide_password=False)
    with Database.open(url) as database:
        database.optuna_storage()
        found = inspect(database.engine)
        assert "studies" in found.get_table_names("public")
        assert "studies" not in found.get_table_names("was")
    with Database.open(url) as again:
        again.optuna_storage()
