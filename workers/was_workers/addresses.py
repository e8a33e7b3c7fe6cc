"""What listens at an address that was given for Ray, asked within seconds: Ray itself would try for many minutes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from was_search.errors import ResourceError

T = TypeVar("T")

DEADLINE_SECONDS = 15.0
"""Time after which an address is refused."""

_CONNECT_SECONDS = 4.0
_ANSWER_SECONDS = 8.0
_GUESS_SECONDS = 1.0

CLIENT = "ray://"

PORTS = (
    "a head has HOST:6379 for this machine as a node of the cluster, ray://HOST:10001 from outside of it, and "
    "http://HOST:8265 for its dashboard and 'was-search submit'"
)


def require_ray(address: str) -> None:
    """Refuse an address unless a Ray head answers there, as a node's or, with ``ray://``, as a client's.

    Raises:
        ResourceError: it is none, nothing listens there, or something else does; within :data:`DEADLINE_SECONDS`.
    """
    host, port = _host_and_port(address)
    _within(DEADLINE_SECONDS, lambda: _require_ray(address, host, port), f"ray: nothing answers at {address}; {PORTS}")


def require_http(address: str) -> None:
    """Refuse ``address``, a URL, unless an HTTP server answers there within :data:`DEADLINE_SECONDS`.

    Raises:
        ResourceError: it does not.
    """
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    def ask() -> None:
        try:
            _connect(host, port)
        except OSError as error:
            raise ResourceError(f"ray: jobs at {address}: nothing answers ({error}); {PORTS}") from error
        if parts.scheme == "http" and (kind := what_listens(host, port, _ANSWER_SECONDS / 2)) != _HTTP:
            raise ResourceError(f"ray: jobs at {address}: {kind} listens there, and no dashboard; {PORTS}")

    _within(DEADLINE_SECONDS, ask, f"ray: jobs at {address}: nothing answers; {PORTS}")


def _require_ray(address: str, host: str, port: int) -> None:
    try:
        _connect(host, port)
    except OSError as error:
        raise ResourceError(
            f"ray: nothing answers at {address} ({error}); start a cluster with 'ray start --head', or use --ray local"
        ) from error
    client = address.startswith(CLIENT)
    answer = _asked(host, port, client=client)
    if answer == "here":
        return
    listens = what_listens(host, port, _GUESS_SECONDS)
    if answer == "other" and listens != _HTTP:
        other = f"{host}:{port}" if client else f"{CLIENT}{host}:{port}"
        what = "a node's port" if client else "the port of Ray's client"
        raise ResourceError(f"ray: {address} is {what}, or another service of Ray's: try --ray {other}; {PORTS}")
    raise ResourceError(f"ray: no Ray head answers at {address}: {listens} listens there; {PORTS}")


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ResourceError(f"ray: must be auto, local or HOST:PORT, got {address!r}; {PORTS}")
    return host.strip("[]"), int(port)


def _connect(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except UnicodeError as error:  # no name can be so
        raise OSError(str(error)) from error


def _asked(host: str, port: int, *, client: bool) -> str:
    """What a call of Ray's protocol says: ``here``, ``other`` (gRPC without this service), or "" (no gRPC)."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel  # knows Ray's TLS

    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    channel = init_grpc_channel(target, options=[("grpc.enable_http_proxy", 0)])  # nor does Ray go through one
    try:
        _first_call(channel, client=client)
    except grpc.RpcError as error:
        wrong_token, no_service = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED
        return {wrong_token: "here", no_service: "other"}.get(error.code(), "")
    finally:
        channel.close()
    return "here"


def _first_call(channel: Any, *, client: bool) -> None:
    # Generated code, of which type checkers see nothing.
    messages: Any
    services: Any
    if client:
        from ray.core.generated import ray_client_pb2 as messages
        from ray.core.generated import ray_client_pb2_grpc as services

        question = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
        services.RayletDriverStub(channel).ClusterInfo(question, timeout=_ANSWER_SECONDS)
    else:
        from ray.core.generated import gcs_service_pb2 as messages
        from ray.core.generated import gcs_service_pb2_grpc as services

        services.NodeInfoGcsServiceStub(channel).GetClusterId(messages.GetClusterIdRequest(), timeout=_ANSWER_SECONDS)


_HTTP = "an HTTP server"


def what_listens(host: str, port: int, seconds: float) -> str:
    """In words, what takes connections there, as far as it answers one of two questions within ``seconds``."""
    if _reply(host, port, b"GET / HTTP/1.0\r\nHost: was-search\r\n\r\n", seconds).startswith(b"HTTP/"):
        return _HTTP
    if _reply(host, port, b"\x00\x00\x00\x08\x04\xd2\x16\x2f", seconds) in (b"S", b"N"):  # "do you take TLS?"
        return "Postgres"
    return "something else, which does not answer,"


def _reply(host: str, port: int, question: bytes, seconds: float) -> bytes:
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            connection.sendall(question)
            return connection.recv(64)
    except OSError:
        return b""


def _within(seconds: float, function: Callable[[], T], late: str) -> T:
    """The function's result; a ResourceError ``late`` where it takes longer, as names that nobody resolves do."""
    found: list[T] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            found.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, name="ray address", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise ResourceError(late)
    return found[0]
