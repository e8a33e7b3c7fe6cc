"""optuna-dashboard's web server on our database."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna

from was_search.errors import ResourceError
from was_search.process.collector import collector_at_rest
from was_storage.dashboard.host_check import answered_names, only_for
from was_storage.server.database import Database

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8080
_logger = logging.getLogger(__name__)


class DashboardServer(ThreadingMixIn, WSGIServer):
    """The dashboard's web server, bound but not yet serving; made by :func:`open_dashboard`."""

    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, address: tuple[Any, ...], app: Any) -> None:
        self.address_family = family
        super().__init__(address, _QuietHandler)
        self.set_app(app)

    def server_bind(self) -> None:
        # The parent looks its own name up, which blocks where the name server does not answer.
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    @property
    def url(self) -> str:
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}/dashboard"


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        _logger.debug(format, *args)

    def address_string(self) -> str:
        return str(self.client_address[0])


def open_dashboard(
    database: Database, host: str = LOOPBACK, port: int = DEFAULT_PORT, *, allow_hosts: Iterable[str] = ()
) -> DashboardServer:
    """Bind the dashboard to an address; the caller serves and closes it. Port 0 takes any free one.

    It answers requests under the names localhost, ``host`` and ``allow_hosts`` and under numeric addresses only; see
    :mod:`was_storage.dashboard.host_check`.

    The dashboard has no login. On a database that :meth:`Database.read_only` made, everything but looking is refused;
    on others everyone who reaches it can edit studies: keep it on the loopback address, or behind a proxy that
    asks for a login.

    Raises:
        ResourceError: the port is taken or forbidden, or the host is none of this machine's.
        ConfigError: one of ``allow_hosts`` is no host's name.
        StorageError: Optuna's tables are of another version.
    """
    with collector_at_rest():
        from optuna_dashboard._app import create_app

    from was_storage.dashboard.plan_files import PlanFiles

    names = answered_names(host, allow_hosts)
    # The cache re-reads unfinished trials only: a page of 10,000 trials stays quick.
    storage = optuna.storages.get_storage(database.optuna_storage())
    if not 0 <= port <= 65535:
        raise ResourceError(f"dashboard: port must be 0 to 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        app = create_app(storage, artifact_store=PlanFiles(database))
        guarded = only_for(names, _guarded(app, reads_only=database.reads_only))
        return DashboardServer(family, address, guarded)
    except OSError as error:
        raise ResourceError(
            f"dashboard: cannot listen on {host}:{port} ({error.strerror or error}); choose another port or host"
        ) from error


_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Referrer-Policy", "same-origin"),
)
_DOWNLOAD = (("Content-Disposition", "attachment"), ("Content-Security-Policy", "sandbox; default-src 'none'"))
"""Headers of downloaded artifacts: an HTML page among them must not run as one of the dashboard's."""


def _guarded(app: WSGIApplication, *, reads_only: bool) -> WSGIApplication:
    """``app`` with headers for browsers; with ``reads_only`` it answers nothing but looking."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if reads_only and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start("403 Forbidden", [("Content-Type", "application/json"), *_HEADERS])
            return [b'{"reason": "this dashboard only shows: was-search dashboard --allow-edits lets it change"}']
        more = [*_HEADERS, *(_DOWNLOAD if environ["PATH_INFO"].startswith("/artifacts/") else ())]

        def with_headers(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start(status, [*headers, *more], *rest)

        return app(environ, with_headers)

    return answer


def serve(
    database: Database,
    host: str = LOOPBACK,
    port: int = DEFAULT_PORT,
    *,
    allow_hosts: Iterable[str] = (),
    listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve the dashboard until interrupted; ``database`` stays open, and with it the embedded server.

    ``listening`` is called with the dashboard's URL once the port is ours.

    Raises:
        ResourceError: the address cannot be used; see :func:`open_dashboard`.
        ConfigError: one of ``allow_hosts`` is no host's name.
    """
    with open_dashboard(database, host, port, allow_hosts=allow_hosts) as server:
        _logger.info("dashboard on %s", server.url)
        listening(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
