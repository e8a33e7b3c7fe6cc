"""Serve a model with a plan, or dense, by OpenAI's protocol."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from was_search.errors import ConfigError, ResourceError
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.steps.decoding import ends_of_answers
from was_search.service.steps.evaluation import load_for

if TYPE_CHECKING:
    from was_search.service.serving.application import Served

_FINISHING_SECONDS = 4.0
"""Time that answers get to finish once the server has been asked to end."""

_LIBRARIES = ("starlette", "uvicorn", "pydantic")


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and its limits.

    Attributes:
        host: address to listen on; a loopback address is reached from this machine only.
        port: 0 takes one that is free.
        name: what clients call the model; "": its own name.
        api_key: that clients must send; "": none.
        most_new: new tokens of one request.
        most_requests: waiting and decoded at a time.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key: str = ""
    most_new: int = 1024
    most_requests: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port: must be from 0 to 65535, got {self.port}")
        for option, value in (("max_new_tokens", self.most_new), ("max_requests", self.most_requests)):
            if value < 1:
                raise ConfigError(f"{option}: must be at least 1, got {value}")
        if not (self.api_key.isascii() and self.api_key.isprintable()) or " " in self.api_key:
            # What follows "api_key:" in a message is hidden, as a key would be.
            raise ConfigError("API key: must be of printable ASCII characters without blanks")


def serve(
    context: Context,
    plan: Plan | None,
    options: ServerOptions,
    *,
    gpus: int = 1,
    started: Callable[[Any], None] = lambda server: None,
) -> None:
    """Answer requests until the process is asked to end (SIGINT or SIGTERM).

    Requests are decoded one after another, each as fast as the model goes.

    Args:
        context: its settings give model, device and dtype.
        plan: for this model; None: dense.
        options: where, and how much at a time.
        gpus: GPUs that the model is spread over.
        started: called with uvicorn's server before it runs; its ``should_exit`` ends it.

    Raises:
        ConfigError: the port is in use, or the host is no address of this machine.
        PlanError: the plan belongs to another model.
        ResourceError: fewer than ``gpus`` GPUs, or the libraries of a server are not installed.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ResourceError(f"serve needs {', '.join(missing)}, not installed here; pip install 'was-search[serve]'")
    import uvicorn

    from was_kernels import DecodingLoop, sparsify
    from was_search.checkpoints.load import load_tokenizer
    from was_search.service.serving.application import Served, Server
    from was_search.service.serving.engine import Engine

    listening = _listening(options)
    tokenizer = load_tokenizer(context.model.source)
    model, _ = load_for(context, plan, gpus)
    handle = None if plan is None else sparsify(model, plan)
    applied: AbstractContextManager[Any] = nullcontext() if handle is None else handle
    with listening, applied:
        loop = DecodingLoop(model) if handle is None else handle.loop
        served = Served(
            name=options.name or context.model.source.display_name,
            tokenizer=tokenizer,
            rows=context.model.token_rows,
            positions=context.model.positions,
            most_new=options.most_new,
            ends=loop.eos,
            api_key=options.api_key,
            chat_ends=loop.eos | ends_of_answers(tokenizer),
        )
        engine = Engine(loop, tokenizer, options.most_requests)
        application = Server(served, engine).application
        config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=5, lifespan="on")

        class Ending(uvicorn.Server):
            """Tells those whose answers are not finished soon that it ends, before their tasks are cancelled."""

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                asyncio.get_running_loop().call_later(_FINISHING_SECONDS, engine.stop)
                await super().shutdown(sockets)

        server = Ending(config)
        started(server)
        for line in _lines(context, served, plan, options, listening.getsockname()[1]):
            context.reporter.note(line)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has ended in order, and raises the signal again
            context.reporter.note("stopped")


def _listening(options: ServerOptions) -> socket.socket:
    """A socket on the address that is wanted, before anything is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"port: cannot listen on {options.host} port {options.port} ({error.strerror}); give another with --port, "
            "or another --host"
        ) from error
    return listening


def _lines(context: Context, served: Served, plan: Plan | None, options: ServerOptions, port: int) -> list[str]:
    """What is said once requests can come."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    how = "dense" if plan is None else f"a plan of {100 * plan.budget:.1f} %"
    lines = [
        f"{served.name}, {how}, {context.placement_here.device}, at http://{host}:{port}/v1 (Ctrl-C ends it)",
    ]
    if not options.api_key and not _is_loopback(options.host):
        lines.append("anybody who reaches this address may use it: set WAS_SEARCH_API_KEY, or listen on 127.0.0.1")
    return lines


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
