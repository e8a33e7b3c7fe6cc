"""Posts a small JSON to a URL when a run has ended; its receiver can neither hold up nor end a run."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from was_search.errors import ConfigError
from was_search.process.plain_json import dumps

TIMEOUT_SECONDS = 10.0
_logger = logging.getLogger(__name__)


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


def post(url: str, payload: Mapping[str, Any], *, timeout_seconds: float = TIMEOUT_SECONDS) -> bool:
    """Post ``payload`` as JSON; returns whether the receiver took it.

    Errors are logged with the receiver's host alone, and never raised.
    """
    host = urlsplit(url).hostname
    body = dumps(payload).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds):
            return True
    except urllib.error.HTTPError as error:
        _logger.warning("notify: %s answered with status %d", host, error.code)
        error.close()
    except (OSError, HTTPException, ValueError) as error:
        _logger.warning("notify: %s did not take the message (%s)", host, type(error).__name__)
    return False
