"""Which addresses settings take, and what is said of others."""

from __future__ import annotations

import pytest

from was_search.errors import ConfigError
from was_search.service.addresses import check_webhook, parse_address
from was_search.service.settings import Settings


@pytest.mark.parametrize("address", ["x", "host:", ":0", "1:70000", "host:port"])
def test_wrong_addresses(address):
    with pytest.raises(ConfigError, match="metrics: must be HOST:PORT or PORT, got"):
        parse_address(address)


def test_addresses():
    assert parse_address("9400") == ("127.0.0.1", 9400)
    assert parse_address("0.0.0.0:9400") == ("0.0.0.0", 9400)
    assert parse_address("[::1]:9400") == ("::1", 9400)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "must be a URL that starts with http"),
        ("host/s3cret", "must be a URL that starts with http"),
        ("https://", "must be a URL that starts with http"),
        ("http://host:port/s3cret", "must be a URL that starts with http"),
        ("http://host/a b", "must be a URL that starts with http"),
        ("file:///etc/passwd", "must be a URL that starts with http"),
        ("https://ada:s3cret@host/x", "must hold no user or password"),
    ],
)
def test_urls_that_are_refused_are_not_repeated(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_webhook(url)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match=words):
        Settings(notify=url)
