"""The server as its clients see it: a real one on a loopback port, on a tiny checkpoint whose tokenizer knows chats."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.places.checkpoints import checkpoint
from tests.places.tokenizers import with_template
from was_search.errors import ConfigError
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.service.settings import Settings
from was_search.service.steps.decoding import generate
from was_search.service.steps.serving import ServerOptions, serve

KEY = "a-key"
get, post = partial(httpx.get, verify=False), partial(httpx.post, verify=False)
"""Without TLS: each call would read all of the machine's authorities before."""
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Running:
    """A server in a thread, and a client for it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.reporter = Notes()
        self.folder = folder
        self._server: Any = None
        self._ready = threading.Event()
        given = {"port": 0, "name": "tiny", "api_key": KEY, "most_new": 400, "most_requests": 2, **options}
        self._thread = threading.Thread(target=self._run, args=(ServerOptions(**given),), daemon=True)
        self._thread.start()
        assert self._ready.wait(120), "the server did not start"
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=False)

    def _run(self, options: ServerOptions) -> None:
        settings = Settings(model=str(self.folder), device="cpu", dtype="float32")
        with Context(settings, self.reporter) as context:
            serve(context, None, options, started=self._began)

    def _began(self, server: Any) -> None:
        self._server = server
        self._ready.set()

    def post(self, path: str, **asked: Any) -> httpx.Response:
        return self.client.post(f"/v1/{path}", json={"model": "tiny", "temperature": 0, **asked})

    def request(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What httpx.post takes, for a client of its own."""
        headers = {"Authorization": f"Bearer {KEY}"}
        return {"url": f"{self.url}/v1/{path}", "json": asked, "headers": headers, "timeout": 60}

    def streamed(self, path: str, **asked: Any) -> list[Any]:
        with self.client.stream(
            "POST", f"/v1/{path}", json={"model": "tiny", "temperature": 0, "stream": True, **asked}
        ) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def in_flight(self) -> float:
        text = self.client.get("/metrics").text
        return float(
            next(line for line in text.splitlines() if line.startswith("was_search_requests_in_flight")).split()[1]
        )

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = with_template("$A")
    tokenizer.chat_template = CHAT
    return checkpoint(tmp_path_factory.mktemp("served"), tokenizer=tokenizer, max_position_embeddings=512)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    running = Running(folder)
    yield running
    running.close()


def test_a_completion_is_what_generate_writes(server):
    found = server.post("completions", prompt="abc", max_tokens=12)
    assert found.status_code == 200, found.text
    with Context(Settings(model=str(server.folder), device="cpu", dtype="float32")) as context:
        expected = generate(context, None, "abc", max_new_tokens=12)
    answer = found.json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, "length")
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    ids = [ord(c) for c in "abc"]
    for prompt in (ids, ["abc"]):
        again = server.post("completions", prompt=prompt, max_tokens=12).json()
        assert again["choices"] == answer["choices"]
    nulls = {"stop": None, "seed": None, "max_tokens": None, "stream": None, "user": "somebody"}
    assert server.post("completions", prompt="abc", **nulls).json()["usage"]["completion_tokens"] == 16


def test_a_streamed_completion_is_the_same_in_parts(server):
    whole = server.post("completions", prompt="abc", max_tokens=12).json()["choices"][0]["text"]
    events = server.streamed("completions", prompt="abc", max_tokens=12, stream_options={"include_usage": True})
    *chunks, usage = events
    assert "".join(event["choices"][0]["text"] for event in chunks) == whole
    assert [event["choices"][0]["finish_reason"] for event in chunks][-1] == "length"
    assert len(chunks) > 3 and len({event["id"] for event in events}) == 1
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12


def test_a_chat_is_written_by_the_template(server):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]},
    ]
    answer = server.post("chat/completions", messages=messages, max_completion_tokens=9).json()
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and answer["object"] == "chat.completion"
    prompt = "<system>Be short.<user>abc<assistant>"
    same = server.post("completions", prompt=prompt, max_tokens=9).json()
    assert choice["message"]["content"] == same["choices"][0]["text"]
    assert answer["usage"] == same["usage"]
    first, *events = server.streamed("chat/completions", messages=messages, max_tokens=9)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == choice["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_stops_and_sampling(server):
    text = server.post("completions", prompt="abc", max_tokens=40).json()["choices"][0]["text"]
    stop = text[20:22]
    choice = server.post("completions", prompt="abc", max_tokens=40, stop=[stop, "\x00never"]).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    drawn = [
        server.post("completions", prompt="abc", max_tokens=20, temperature=1.5, seed=seed).json()["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    unseeded = [server.post("completions", prompt="abc", max_tokens=20, temperature=1.5).json() for _ in range(2)]
    assert unseeded[0]["choices"][0]["text"] != unseeded[1]["choices"][0]["text"]


def test_models_health_and_metrics(server):
    assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["tiny"]
    assert server.client.get("/v1/models/tiny").json()["object"] == "model"
    assert get(f"{server.url}/health").json() == {"status": "ok"}
    server.post("completions", prompt="abc", max_tokens=5)
    text = get(f"{server.url}/metrics").text
    assert 'was_search_tokens_total{kind="new"}' in text
    assert 'was_search_requests_total{path="/v1/completions",status="200"}' in text


MESSAGE = [{"role": "user", "content": "abc"}]


@pytest.mark.parametrize(
    ("path", "asked", "status", "code", "message"),
    [
        ("completions", {"model": "other", "prompt": "a"}, 404, "model_not_found", "'other' is not served here"),
        ("completions", {}, 400, None, "prompt"),
        ("completions", {"prompt": ""}, 400, None, "prompt: must not be empty"),
        ("completions", {"prompt": []}, 400, None, "prompt: must not be empty"),
        ("completions", {"prompt": ["a", "b"]}, 400, None, "one at a time"),
        ("completions", {"prompt": [5, 99999]}, 400, None, "prompt: token ids must be from 0 to 259, got id 99999"),
        ("completions", {"prompt": [-1]}, 400, None, "id -1"),
        ("completions", {"prompt": [99999999999]}, 400, None, "got id 99999999999"),
        ("completions", {"prompt": [10**18]}, 400, None, "got id 1000000000000000000"),
        ("completions", {"prompt": [10**30]}, 400, None, "got id a longer one"),
        ("completions", {"prompt": "a" * 600}, 400, "context_length_exceeded", "600 tokens of the prompt"),
        ("completions", {"prompt": "a" * 500, "max_tokens": 30}, 400, "context_length_exceeded", "512 positions"),
        ("completions", {"prompt": "a", "max_tokens": 401}, 400, None, "max_tokens: at most 400"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, None, "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": "many"}, 400, None, "max_tokens"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, None, "temperature"),
        ("completions", {"prompt": "a", "top_p": 0}, 400, None, "top_p"),
        ("completions", {"prompt": "a", "stop": ""}, 400, None, "stop"),
        ("completions", {"prompt": "a", "n": 2}, 400, None, "n: not supported"),
        ("completions", {"prompt": "a", "logprobs": 1}, 400, None, "logprobs: not supported"),
        ("completions", {"prompt": "a\ud800"}, 400, None, "Invalid JSON"),
        ("chat/completions", {"messages": []}, 400, None, "messages"),
        ("chat/completions", {"messages": [{"content": "x"}]}, 400, None, "messages.0.role"),
        ("chat/completions", {"messages": MESSAGE, "tools": [{"type": "function"}]}, 400, None, "tools: not supported"),
    ],
)
def test_what_is_refused(server, path, asked, status, code, message):
    body = json.dumps({"model": "tiny", **asked})
    found = server.client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert error["code"] == code and message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_bodies_paths_and_keys_that_are_refused(server):
    url, key = f"{server.url}/v1/completions", {"Authorization": f"Bearer {KEY}"}
    typed = {**key, "Content-Type": "application/json"}
    for content in (b"{", b"[]", b"\xff", b'{"model": "tiny", "prompt": ' + b"[" * 100_000):
        found = post(url, content=content, headers=typed)
        assert found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error"
    assert post(url, content=b"{}", headers={**key, "Content-Type": "text/plain"}).status_code == 415
    assert post(url, content=b" " * (5 << 20), headers=typed).status_code == 413
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {b"Authorization": b"Bearer \xe9"}):
        found = post(url, json={"model": "tiny", "prompt": "a"}, headers=headers)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    found = post(url, content=b'{"model": "tiny", "prompt": "a", "temperature": NaN}', headers=typed)
    assert found.status_code == 400 and "temperature: Input should be a finite number" in found.text
    for method, path, allowed in (
        ("GET", "/v1/nothing", None),
        ("GET", "/v1/completions", {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
    ):
        found = server.client.request(method, path)
        assert found.status_code == (405 if allowed else 404) and found.json()["error"]["message"]
        assert allowed is None or set(found.headers["Allow"].split(", ")) == allowed


def settled(server: Running) -> None:
    """Wait until nothing is decoded any more."""
    end = time.monotonic() + 60
    while server.in_flight() > 0:
        assert time.monotonic() < end, "a request that was cut off still has its place"
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(server, stream, monkeypatch):
    """The loop is slowed so that the text would take a minute."""
    slow(monkeypatch, 0.15)
    asked = {"model": "tiny", "temperature": 0, "prompt": "abc", "max_tokens": 400, "stream": stream}
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    while server.in_flight() < 1:
        time.sleep(0.02)
    connection.close()
    began = time.monotonic()
    settled(server)
    assert time.monotonic() - began < 20
    monkeypatch.undo()
    assert server.post("completions", prompt="abc", max_tokens=3).status_code == 200


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    from was_kernels import DecodingLoop

    plain = DecodingLoop.stream

    def stream(self: Any, *args: Any, **given: Any) -> Iterator[Any]:
        for step in plain(self, *args, **given):
            time.sleep(seconds)
            yield step

    monkeypatch.setattr(DecodingLoop, "stream", stream)


def test_more_requests_than_wanted_are_sent_away(server, monkeypatch):
    slow(monkeypatch, 0.1)
    answers: list[int] = []

    def ask() -> None:
        answers.append(server.post("completions", prompt="abc", max_tokens=30).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    while server.in_flight() < 2:
        time.sleep(0.02)
    found = server.post("completions", prompt="abc", max_tokens=3)
    assert found.status_code == 429 and found.headers["retry-after"] == "1"
    assert found.json()["error"]["code"] == "rate_limit_exceeded"
    for thread in threads:
        thread.join(60)
    assert answers == [200, 200]


@pytest.mark.parametrize("stream", [True, False])
def test_places_are_taken_at_once(server, monkeypatch, stream):
    """Of twelve requests that come together two are answered, however late they begin to be decoded."""
    slow(monkeypatch, 0.1)
    asked = {"model": "tiny", "temperature": 0, "prompt": "abc", "max_tokens": 12, "stream": stream}
    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(lambda _: httpx.post(**server.request("completions", asked)).status_code, range(12)))
    assert sorted(found) == [200] * 2 + [429] * 10
    settled(server)


def test_a_client_that_goes_before_its_body_has_come(server, caplog):
    for length in (100, -1):
        connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f'{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{{"mod'.encode())
        time.sleep(0.2)
        connection.close()
    assert server.post("completions", prompt="abc", max_tokens=3).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_are_not_finished_when_the_server_ends(folder, monkeypatch, caplog, stream):
    slow(monkeypatch, 0.1)
    monkeypatch.setattr("was_search.service.steps.serving._FINISHING_SECONDS", 0.5)
    running = Running(folder)
    asked = {"model": "tiny", "temperature": 0, "prompt": "abc", "max_tokens": 400, "stream": stream}
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(lambda: httpx.post(**running.request("completions", asked)))
        while running.in_flight() < 1:
            time.sleep(0.02)
        running.close()
        found = answer.result(30)
    assert found.status_code == (200 if stream else 503)
    last = json.loads(found.text.split("data: ")[-2]) if stream else found.json()
    assert last["error"]["message"] == "the server is shutting down"
    assert last["error"]["code"] == "service_unavailable"
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_the_model_is_said_and_the_server_goes_on(server, monkeypatch, stream):
    from was_kernels import DecodingLoop

    def stream_of(self: Any, *args: Any, **given: Any) -> Iterator[Any]:
        yield [97]
        raise RuntimeError("CUDA error: out of luck")

    monkeypatch.setattr(DecodingLoop, "stream", stream_of)
    if stream:
        events = server.streamed("completions", prompt="abc", max_tokens=9)
        assert "out of luck" in events[-1]["error"]["message"]
    else:
        found = server.post("completions", prompt="abc", max_tokens=9)
        assert found.status_code == 500 and "out of luck" in found.json()["error"]["message"]
    monkeypatch.undo()
    settled(server)
    assert server.post("completions", prompt="abc", max_tokens=3).status_code == 200


def test_what_it_says_of_itself(server, folder):
    assert server.reporter.notes[0].startswith("tiny, dense, cpu, at http://127.0.0.1:")
    assert not any("anybody" in note for note in server.reporter.notes)


def test_a_port_in_use_and_other_wrong_options(folder):
    with socket.socket() as taken, Context(Settings(model=str(folder), device="cpu"), Notes()) as context:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1 port {port} \(.*in use.*--port"):
            serve(context, None, ServerOptions(port=port))
        with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
            serve(context, None, ServerOptions(host="192.0.2.1", port=0))
    for options, message in (
        ({"port": 65536}, "port: must be from 0 to 65535, got 65536"),
        ({"most_new": 0}, "max_new_tokens: must be at least 1"),
        ({"most_requests": 0}, "max_requests: must be at least 1"),
        ({"api_key": "with blanks"}, "API key: must be of printable ASCII characters"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServerOptions(**options)
