"""Addresses for Ray where something else listens, or nothing: refused within seconds, with what is there."""

from __future__ import annotations

import time

import grpc
import pytest

from tests.places import listeners
from was_search.errors import ResourceError
from was_workers import addresses
from was_workers.addresses import DEADLINE_SECONDS, require_http, require_ray
from was_workers.jobs import Jobs


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who listens on this machine answers at once, or never."""
    monkeypatch.setattr(addresses, "_ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(addresses, "_GUESS_SECONDS", 0.5)


OTHERS = [
    (listeners.silent, "something else, which does not answer"),
    (listeners.web, "an HTTP server"),
    (listeners.database, "Postgres"),
    (listeners.mail, "something else"),
    (listeners.hanging_up, "something else"),
]


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(("listener", "what"), OTHERS)
def test_something_else_listens_there(listener: listeners.Listener, what: str, scheme: str) -> None:
    with listener() as port, pytest.raises(ResourceError) as refused:
        require_ray(f"{scheme}127.0.0.1:{port}")
    words = str(refused.value)
    assert words.startswith(f"ray: no Ray head answers at {scheme}127.0.0.1:{port}: {what}")
    assert "HOST:6379" in words and "ray://HOST:10001" in words and "http://HOST:8265" in words


def test_the_deadlines_of_all_questions_are_within_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    parts = addresses._CONNECT_SECONDS + addresses._ANSWER_SECONDS + 2 * addresses._GUESS_SECONDS
    assert parts < DEADLINE_SECONDS <= 15.0


@pytest.mark.parametrize(
    ("scheme", "method"), [("", listeners.NODES), ("ray://", listeners.CLIENTS)], ids=["node", "client"]
)
def test_a_head_is_let_pass_also_where_it_asks_for_a_token(scheme: str, method: str) -> None:
    for code in (None, grpc.StatusCode.UNAUTHENTICATED):
        with listeners.grpc_service(method, code=code) as port:
            require_ray(f"{scheme}127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("scheme", "method", "advice"),
    [("", listeners.CLIENTS, "try --ray ray://127.0.0.1:"), ("ray://", listeners.NODES, "try --ray 127.0.0.1:")],
    ids=["client's for a node's", "node's for a client's"],
)
def test_the_other_port_of_a_head(scheme: str, method: str, advice: str) -> None:
    with listeners.grpc_service(method) as port, pytest.raises(ResourceError) as refused:
        require_ray(f"{scheme}127.0.0.1:{port}")
    assert advice in str(refused.value)


def test_a_name_that_nobody_resolves_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "DEADLINE_SECONDS", 0.3)
    monkeypatch.setattr(addresses.socket, "create_connection", lambda *args, **options: time.sleep(30))
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"nothing answers at head:6379; a head has HOST:6379"):
        require_ray("head:6379")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "address", ["head", "head:", ":6379", "head:port", "head:0", "head:70000", "http://head:8265", "http://head:8265/"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ResourceError, match=r"ray: must be auto, local or HOST:PORT, got .*http://HOST:8265 for its"):
        require_ray(address)


def test_a_port_where_nothing_listens() -> None:
    with listeners.silent() as port:
        pass
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ResourceError, match=r"nothing answers at .*start a cluster with 'ray start --head'"):
            require_ray(address)


@pytest.mark.parametrize(("listener", "what"), [each for each in OTHERS if each[0] is not listeners.web])
def test_jobs_are_sent_to_no_other_server(listener: listeners.Listener, what: str) -> None:
    with listener() as port, pytest.raises(ResourceError, match=rf"jobs at http://.*: {what}.* and no dashboard"):
        Jobs(f"http://127.0.0.1:{port}")


def test_a_web_server_may_be_the_dashboard() -> None:
    with listeners.web() as port:
        require_http(f"http://127.0.0.1:{port}")
