"""Database URLs as people may type them: opened as libpq reads them, or refused in one line without the password."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from urllib.parse import quote

import psycopg2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn
from typer.testing import CliRunner

from was_search.errors import StorageError, TransientError
from was_search.process.redaction import out_of_the_arguments, redacted, secret_of
from was_search.service.cli.main import app
from was_storage.server.database import Database
from was_storage.server.urls import DRIVER, display_url, normalise_url, parameters

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
SECRET = "s3cr3tw0rd"


def quoted(password: str) -> str:
    return quote(password, safe="", errors="replace")


schemes = st.sampled_from(
    ["postgres://", "postgresql://", f"{DRIVER}://", "postgresql:/", "mysql://", "POSTGRES://", ""]
)
odd = st.text(st.characters(), max_size=4)
passwords = st.builds(lambda a, b: a + SECRET + b, odd, odd)
hosts = st.sampled_from(
    [
        *("h", "127.0.0.1", "[::1]", "[::1", "h1,h2", "h1:1,h2:2", "%2Ftmp%2Fx", "", ",", "ü.example", "@x", "h%zz"),
        *("fe80::1%eth0", "127.0.0.1:1,[::1]"),
    ]
)
ports = st.sampled_from(
    ["", ":5432", ":", ":0", ":65536", ":x", ":-1", ":1,2", ":٣", ":5432:1", ":99999999999999999999"]
)
names = st.sampled_from(["", "/", "/d", "/d%20e", "/d e", "/%00", "/%ff", "/a@b", "//", "/d#f", "/d;x"])
queries = st.sampled_from(
    [
        *("", "?", "?x", "?x=1", "?sslmode=require", "?sslmode=", "?host=/tmp/x&port=5", "?host=a&host=b", "?ssl=true"),
        *("?options=-c%20a%3Db+c", "?service=s", "?passfile=~/p", "?passfile=~nobody-there/p", "?connect_timeout=soon"),
        *("?sslmode=require?x=1", "?application_name=%E2%82%AC", "?&&", "?user=u&password=" + SECRET, "?port=1,2"),
    ]
)
urls = st.one_of(
    st.builds(
        lambda scheme, user, password, host, port, name, query: f"{scheme}{user}:{password}@{host}{port}{name}{query}",
        *(schemes, st.sampled_from(["u", "", "ü", "a%40b"]), st.one_of(passwords, passwords.map(quoted))),
        *(hosts, ports, names, queries),
    ),
    st.builds(lambda a, p, b: f"{a}password={p}{b}", odd, passwords, odd),
    st.builds(lambda p, b: f"host=h password='{p}' {b}", passwords, odd),
)


def refused_in_one_line(error: BaseException) -> None:
    assert isinstance(error, StorageError | TransientError)
    assert SECRET not in repr(error)
    assert len(str(error).splitlines()) == 1
    cause = error.__cause__
    while cause is not None:
        assert SECRET not in repr(cause)
        cause = cause.__cause__


@settings(max_examples=EXAMPLES)
@given(urls)
@example(f"postgresql://u:{SECRET}@[::1/d")
@example(f"postgresql://u:12/{SECRET}@h/d")
@example(f"postgresql://u:a?{SECRET}@h@x/d")
def test_a_url_is_read_as_libpq_reads_it_or_refused(url: str) -> None:
    schemeless = not url.strip().startswith("postgres")
    text = schemeless and "password" not in url and len(url.split()) > 1  # words with a blank and no scheme
    assert text or secret_of(url) or SECRET not in redacted(url)
    out_of_the_arguments(["run", "--storage", url])
    try:
        normal = normalise_url(url)
    except StorageError as error:
        refused_in_one_line(error)
        return
    found = parameters(url)
    bare = url.strip().replace(f"{DRIVER}://", "postgresql://", 1) if url.strip().startswith(DRIVER) else url.strip()
    theirs = parse_dsn(bare)
    assert {key: value for key, value in found.items() if key != "passfile"} == {
        key: value for key, value in theirs.items() if key != "passfile"
    }
    assert normalise_url(normal) == normal
    assert parameters(normal) == found
    assert SECRET not in display_url(url)
    assert display_url(normal) == display_url(url)


@settings(max_examples=EXAMPLES)
@given(st.one_of(st.text(max_size=80), st.text("postgresql:/@?=&%[],.0159abc '\"\\", max_size=60)))
def test_any_words(words: str) -> None:
    for spelled in (words, f"postgresql://{words}", f"postgresql://u@h/{words}", f"host=h {words}"):
        redacted(spelled)
        secret_of(spelled)
        out_of_the_arguments(["run", f"--storage={spelled}"])
        with contextlib.suppress(StorageError):
            assert normalise_url(normalise_url(spelled)) == normalise_url(spelled)
            display_url(spelled)


@pytest.fixture(scope="module")
def short_patience() -> Iterator[None]:
    """No host of these tests answers: do not wait for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGCONNECT_TIMEOUT", "2")
        yield


@settings(max_examples=max(EXAMPLES // 10, 20))
@given(urls.filter(lambda url: "ü.example" not in url and "h" not in _hosts_of(url)))
def test_what_cannot_be_opened_says_so(short_patience: None, url: str) -> None:
    """Nothing listens anywhere: neither a traceback nor a success."""
    try:
        Database.open(url)
    except (StorageError, TransientError) as error:
        refused_in_one_line(error)
    else:
        raise AssertionError(f"opened {display_url(url)}")


def _hosts_of(url: str) -> str:
    """Names that would be looked up, which takes seconds where there is no network."""
    try:
        return parameters(url).get("host", "")
    except StorageError:
        return ""


def test_the_command_says_it_in_one_line() -> None:
    for url in (f"postgresql://u:{SECRET}@[::1/d", f"host='h password={SECRET}", f"postgresql://u:12/{SECRET}@h/d"):
        result = CliRunner().invoke(app, ["studies", "--storage", url])
        assert isinstance(result.exception, StorageError)
        assert SECRET not in result.output + str(result.exception)
    assert psycopg2.extensions.libpq_version() >= 140000  # whose URLs these are
