"""Database URLs."""

from __future__ import annotations

import pytest

from was_search.errors import StorageError
from was_storage.server.urls import display_url, normalise_url


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgres://u:p@h:5432/d", "postgresql+psycopg2://u:p@h:5432/d"),
        ("postgresql://u:p@h/d", "postgresql+psycopg2://u:p@h/d"),
        ("postgresql+psycopg2://u:p@h/d", "postgresql+psycopg2://u:p@h/d"),
        ("  postgresql://h/d\n", "postgresql+psycopg2://h/d"),
        ("postgresql://u:@/d?host=/run/pg", "postgresql+psycopg2://u:@/d?host=%2Frun%2Fpg"),
        ("postgresql://u@h/d?sslmode=require", "postgresql+psycopg2://u@h/d?sslmode=require"),
        ("postgresql://u:p%40ss%2F%7B%25@h/d", "postgresql+psycopg2://u:p%40ss%2F%7B%25@h/d"),
        ("postgresql://u@[::1]:5433/d", "postgresql+psycopg2://u@[::1]:5433/d"),
    ],
)
def test_every_accepted_form_becomes_one(given: str, expected: str) -> None:
    assert normalise_url(given) == expected
    assert normalise_url(expected) == expected


@pytest.mark.parametrize("given", ["sqlite:///x.db", "mysql://h/d", "postgresql+psycopg://h/d", "redis://h"])
def test_other_databases_are_refused(given: str) -> None:
    with pytest.raises(StorageError, match=r"only Postgres is supported, got .*postgresql://user:password@"):
        normalise_url(given)


@pytest.mark.parametrize("given", ["", "embeded", "host=h dbname=d password=hidden"])
def test_no_url_is_refused_without_repeating_it(given: str) -> None:
    with pytest.raises(StorageError, match="not a database URL") as caught:
        normalise_url(given)
    assert "hidden" not in str(caught.value)


def test_bad_port_is_refused_without_the_password() -> None:
    with pytest.raises(StorageError, match="is the port a number") as caught:
        normalise_url("postgresql://u:hidden@h:port/d")
    assert "hidden" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_unescaped_at_sign_in_a_password_is_named() -> None:
    with pytest.raises(StorageError, match="%40") as caught:
        normalise_url("postgresql://u:hid@den@h/d")
    assert "den" not in str(caught.value)


def test_shown_urls_hold_no_password() -> None:
    shown = display_url("postgres://u:hidden@h/d?password=hidden&sslpassword=hidden&sslmode=require")
    assert "hidden" not in shown
    assert shown.startswith("postgresql+psycopg2://u:***@h/d?")
    assert "sslmode=require" in shown
