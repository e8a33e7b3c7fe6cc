"""Which names the dashboard answers to."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator

import pytest

from was_search.errors import ConfigError
from was_storage.dashboard.app import open_dashboard
from was_storage.dashboard.host_check import answered_names, answers_to, host_name
from was_storage.server.database import Database


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:8080", "localhost"),
        ("LocalHost.", "localhost"),
        ("127.0.0.1:8080", "127.0.0.1"),
        ("[::1]:8080", "::1"),
        ("[fe80::1]", "fe80::1"),
        ("dashboard.example.org", "dashboard.example.org"),
        ("", ""),
        ("a b", ""),
        ("localhost@evil.example", ""),
        ("localhost:80:80", ""),
        ("a" * 300, ""),
        ("evil.example/[::1]", ""),
        ("-", ""),
    ],
)
def test_the_name_in_a_host_header(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize("header", ["localhost:1", "127.0.0.1:1", "[::1]:1", "10.0.0.5", "gpu-box:8080", "my.org"])
def test_names_that_are_answered(header: str) -> None:
    assert answers_to(answered_names("gpu-box", ["My.org."]), header)


@pytest.mark.parametrize(
    "header", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8080", "", "gpu-box2"]
)
def test_names_that_are_not(header: str) -> None:
    assert not answers_to(answered_names("gpu-box", ["my.org"]), header)


@pytest.mark.parametrize("given", ["https://my.org", "my.org:443", "my.org/path", "", "*"])
def test_what_is_no_hosts_name(given: str) -> None:
    with pytest.raises(ConfigError, match="allow_host: must be a host's name without scheme, port or path, got "):
        answered_names("127.0.0.1", [given])


@pytest.fixture(scope="module")
def port(database: Database) -> Iterator[int]:
    with database.read_only() as reading, open_dashboard(reading, port=0, allow_hosts=["my.org"]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, host: str | None, method: str = "GET", path: str = "/api/studies") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    try:
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.postgres
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:{port}", "[::1]:{port}", "my.org", "MY.ORG:443"])
def test_the_dashboard_answers(port: int, host: str) -> None:
    status, body = ask(port, host.format(port=port))
    assert status == 200
    assert "study_summaries" in body


@pytest.mark.postgres
@pytest.mark.parametrize("path", ["/api/studies", "/dashboard", "/static/bundle.js", "/artifacts/1/2"])
def test_a_rebound_name_reads_nothing(port: int, path: str) -> None:
    """As a page of evil.example does, whose name has been pointed to 127.0.0.1."""
    status, body = ask(port, f"evil.example:{port}", path=path)
    assert status == 403
    assert body.startswith("The dashboard does not answer to the name 'evil.example': a web site could have")
    assert body.endswith("--allow-host evil.example\n")


@pytest.mark.postgres
@pytest.mark.parametrize("host", [None, "", "<script>", "localhost@evil.example"])
def test_a_request_without_a_name_is_refused_and_not_repeated(port: int, host: str | None) -> None:
    status, body = ask(port, host)
    assert status == 403
    assert "does not answer to requests without a host's name" in body
    assert "script" not in body


@pytest.mark.postgres
@pytest.mark.parametrize("method", ["POST", "DELETE", "HEAD"])
def test_other_methods_are_refused_too(port: int, method: str) -> None:
    assert ask(port, "evil.example", method)[0] == 403
