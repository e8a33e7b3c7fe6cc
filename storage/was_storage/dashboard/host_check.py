"""Under which names a web server on this machine answers.

A page of any web site can have its own name point to 127.0.0.1 a moment after it was loaded (DNS rebinding), and its
scripts then read what listens there as if it were theirs. Browsers send the name along as ``Host``. Numeric addresses
need no list: nobody can point them elsewhere.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from was_search.errors import ConfigError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_NAME = re.compile(r"(?!-)[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_LONGEST_NAME = 253


def host_name(header: str) -> str:
    """The name or address in a ``Host`` header, in lower case, without port and brackets; "" if it is none."""
    name = header.strip().lower()
    if (bracketed := re.fullmatch(r"\[([0-9a-f:.]+)\](:\d*)?", name)) is not None:
        return bracketed.group(1)
    name = re.sub(r":\d*$", "", name).removesuffix(".")
    return name if len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) else ""


def answered_names(listens_on: str, more: Iterable[str] = ()) -> frozenset[str]:
    """Names that a server on the address ``listens_on`` answers to: localhost, that one, and ``more``.

    Raises:
        ConfigError: one of ``more`` is no host's name.
    """
    names = {"localhost", host_name(listens_on)}
    for given in more:
        name = given.strip().lower().removesuffix(".")
        if host_name(name) != name or not name:
            raise ConfigError(f"allow_host: must be a host's name without scheme, port or path, got {given!r}")
        names.add(name)
    return frozenset(names - {""})


def answers_to(names: frozenset[str], header: str) -> bool:
    """Whether a request with this ``Host`` may be answered."""
    name = host_name(header)
    return name in names or _is_address(name)


def only_for(names: frozenset[str], app: WSGIApplication) -> WSGIApplication:
    """``app``, for requests under one of ``names`` or a numeric address; others get 403 and what to do about it."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        header = environ.get("HTTP_HOST", "")
        if answers_to(names, header):
            return app(environ, start)
        name = host_name(header)
        start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")])
        known = f"the name {name!r}" if name else "requests without a host's name"
        option = f" --allow-host {name}" if name else " --allow-host NAME"
        return [
            f"The dashboard does not answer to {known}: a web site could have pointed it here to read your studies. "
            f"If it is yours, start the dashboard with{option}\n".encode()
        ]

    return answer


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
