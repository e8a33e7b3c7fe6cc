"""The webhook: what is refused, what is posted, and that no receiver can end a run."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from was_search.service.reports.webhook import post
from was_search.service.settings import Settings


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], tuple[str, list[Any]]]]:
    """Starts a receiver that answers with a status; gives its URL and what it gets."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[HTTPServer] = []

    def start(status: int) -> tuple[str, list[Any]]:
        got: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                got.append((self.path, self.headers["Content-Type"], json.loads(body)))
                self.send_response(status)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                return

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/secret-path", got

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_json_is_posted(receiver) -> None:
    url, got = receiver(200)
    assert post(url, {"event": "finished", "best_loss_nats": 2.5})
    assert got == [("/secret-path", "application/json", {"event": "finished", "best_loss_nats": 2.5})]


def test_a_receiver_that_refuses_is_logged_without_its_path(receiver, caplog: pytest.LogCaptureFixture) -> None:
    url, got = receiver(500)
    with caplog.at_level(logging.WARNING):
        assert post(url, {}) is False
    assert len(got) == 1
    assert "127.0.0.1 answered with status 500" in caplog.text
    assert "secret-path" not in caplog.text


def test_a_receiver_that_is_not_there(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/secret-path"
        with caplog.at_level(logging.WARNING):
            assert post(url, {}) is False
    assert "did not take the message" in caplog.text
    assert "secret-path" not in caplog.text


def test_a_receiver_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert post(f"http://127.0.0.1:{silent.getsockname()[1]}/", {}, timeout_seconds=0.3) is False
    assert time.monotonic() - started < 30  # a socket's own timeout would be minutes


def test_settings_keep_the_url_to_themselves() -> None:
    settings = Settings(notify="https://hooks.example.org/services/secret")
    assert settings.to_json()["notify"] == "a URL"
