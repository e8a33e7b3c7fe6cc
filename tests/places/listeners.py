"""What may listen at an address that somebody gives for Ray: one function a listener, each gives its port."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

Listener = Callable[[], AbstractContextManager[int]]


@contextmanager
def silent() -> Iterator[int]:
    """Takes connections and says nothing, as a process that hangs."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@contextmanager
def web() -> Iterator[int]:
    """An HTTP server, as Ray's dashboard is one."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def database() -> AbstractContextManager[int]:
    """Answers a client's first question as Postgres does, and hangs up at anything else."""
    return _answering(lambda asked: b"N" if asked == b"\x00\x00\x00\x08\x04\xd2\x16\x2f" else b"")


def mail() -> AbstractContextManager[int]:
    """Speaks first, and not as Ray does."""
    return _answering(lambda asked: b"220 mail.example.org ESMTP\r\n")


def hanging_up() -> AbstractContextManager[int]:
    """Closes every connection, as a proxy without a server behind it."""
    return _answering(lambda asked: b"")


@contextmanager
def _answering(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5.0)
                try:
                    connection.sendall(answer(connection.recv(64)))
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


@contextmanager
def grpc_service(*answers: str, code: grpc.StatusCode | None = None) -> Iterator[int]:
    """A gRPC server that has these methods, as a part of Ray does; with ``code`` it refuses them so."""

    class Methods(grpc.GenericRpcHandler):
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            if call.method not in answers:
                return None

            def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
                if code is not None:
                    context.abort(code, "a token is missing")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Methods()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


NODES = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A method of a head's own port."""

CLIENTS = "/ray.rpc.RayletDriver/ClusterInfo"
"""One of the port for clients."""
