"""Posts a small JSON to a URL when a run has ended; its receiver can neither hold up nor end a run."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from was_search.process.plain_json import dumps

TIMEOUT_SECONDS = 10.0
_logger = logging.getLogger(__name__)


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
