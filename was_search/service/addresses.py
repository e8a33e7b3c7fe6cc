"""Addresses in the settings: where a search serves its metrics, and where the end of a run is told."""

from __future__ import annotations

from urllib.parse import urlsplit

from was_search.errors import ConfigError


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``PORT``.

    Raises:
        ConfigError: anything else.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"metrics: must be HOST:PORT or PORT, got {address!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def check_webhook(url: str) -> None:
    """Raise a ConfigError unless ``url`` is "" or an http or https URL without a user or password.

    The message does not repeat the URL: its path may be a secret.
    """
    if not url:
        return
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise ConfigError("notify: must be a URL that starts with http:// or https://")
    if "@" in parts.netloc:
        raise ConfigError("notify: must hold no user or password; give the receiver a secret path instead")
