"""Database URLs."""

from __future__ import annotations

import pytest

from was_search.errors import StorageError
from was_storage.server.urls import display_url, normalise_url, parameters


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgres://u:p@h:5432/d", "postgresql+psycopg2://u:p@h:5432/d"),
        ("postgresql://u:p@h/d", "postgresql+psycopg2://u:p@h/d"),
        ("postgresql+psycopg2://u:p@h/d", "postgresql+psycopg2://u:p@h/d"),
        ("  postgresql://h/d\n", "postgresql+psycopg2://h/d"),
        ("postgresql://u:@/d?host=/run/pg", "postgresql+psycopg2://u@/d?host=%2Frun%2Fpg"),
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


@pytest.mark.parametrize("given", ["", "embeded", "host=h dbname=d pasword=hidden", "u:hidden=x@h/d"])
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgresql://u@%2Ftmp%2Fx:5432/db", "postgresql+psycopg2://u@/db?host=%2Ftmp%2Fx&port=5432"),
        ("postgresql://h1:5432,h2:5433/db", "postgresql+psycopg2:///db?host=h1%2Ch2&port=5432%2C5433"),
        ("postgresql://h1,h2/db?port=5433", "postgresql+psycopg2:///db?host=h1%2Ch2&port=5433"),
        ("postgresql:///?service=searches", "postgresql+psycopg2://?service=searches"),
        ("service=searches", "postgresql+psycopg2://?service=searches"),
        ("host=h port=5 dbname='a b' user=u password='p w+'", "postgresql+psycopg2://u:p%20w+@h:5/a%20b"),
        ("postgresql://:pw@h/d", "postgresql+psycopg2://:pw@h/d"),
        ("postgresql://h/d?ssl=true", "postgresql+psycopg2://h/d?sslmode=require"),
        ("postgresql://h/d?options=-c%20a%3Db+c", "postgresql+psycopg2://h/d?options=-c%20a%3Db%2Bc"),
        ("postgresql://h/d%3Fx%2Fy%40z", "postgresql+psycopg2://h/d%3Fx/y%40z"),
        ("postgresql://", "postgresql+psycopg2://"),
        ("postgresql://h/d?sslmode=", "postgresql+psycopg2://h/d?sslmode="),
        ("postgresql://%C3%BC:%C3%A9@h/d", "postgresql+psycopg2://%C3%BC:%C3%A9@h/d"),
    ],
)
def test_libpqs_forms(given: str, expected: str) -> None:
    assert normalise_url(given) == expected
    assert parameters(expected) == parameters(given)
    assert normalise_url(expected) == expected


@pytest.mark.parametrize(
    "given",
    [
        "postgresql://u:hid/den@h/d",
        "postgresql://u:12/hid@den/d",
        "postgresql://u:a?hid@den@h/d",
        "postgresql://u:hid@den@h/d",
        "postgresql://u:hid%zzden@h/d",
        "postgresql://u:hid%00den@h/d",
        "postgresql://u:hid%ffden@h/d",
        "postgresql://u:hid\0den@h/d",
        "postgresql://u:hid\nden@h/d",
        "postgresql://u:hid\ud800den@h/d",
        "postgresql://u:hidden@[::1/d",
        "postgresql://h:0/hidden",
        "postgresql://u:hidden@h1:1,h2:x/d",
        "host='h password=hidden",
        "mysql://u:hidden@h/d",
    ],
)
def test_what_libpq_would_misread_is_refused_without_the_password(given: str) -> None:
    with pytest.raises(StorageError) as caught:
        normalise_url(given)
    assert "hid" not in repr(caught.value)
    assert "den" not in repr(caught.value)
    assert caught.value.__cause__ is None


def test_shown_forms_of_libpq_hold_no_password() -> None:
    for given in (
        "postgresql://u:hidden@h1:1,h2:2/d",
        "postgresql://u:hidden@%2Ftmp%2Fx/d",
        "host=h1,h2 user=u password='hid den'",
        "postgresql:///?service=searches&password=hidden&passfile=/p",
    ):
        assert "hid" not in display_url(given)
    assert display_url("postgresql://u:hidden@h1:1,h2:2/d") == "postgresql+psycopg2://u:***@/d?host=h1%2Ch2&port=1%2C2"


def test_a_home_folder_in_a_files_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parameters("postgresql://h/d?passfile=~/pass")["passfile"] == "/home/me/pass"
