"""The artifact cache."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from sqlalchemy import text

from tests.doubles.small_study import whole
from was_search.errors import StorageError
from was_storage.server.database import Database
from was_storage.studies import cache as cache_module
from was_storage.studies.cache import Artifact, ArtifactCache

pytestmark = pytest.mark.postgres


@pytest.fixture
def cache(database: Database) -> ArtifactCache:
    with database.begin() as connection:
        connection.execute(text("DELETE FROM was.artifact"))
    return ArtifactCache(database)


def test_the_first_put_wins(cache: ArtifactCache) -> None:
    payload = bytes(range(256)) * 1000
    assert cache.get("histograms", "k", whole) is None
    assert cache.put("histograms", "k", payload, {"n_blocks": 2})
    assert not cache.put("histograms", "k", b"other")
    assert cache.get("histograms", "k", whole) == Artifact({"n_blocks": 2}, payload)
    assert cache.get("tables", "k", whole) is None


def test_an_empty_payload_is_a_payload(cache: ArtifactCache) -> None:
    cache.put("prices", "k", b"")
    assert cache.get("prices", "k", whole) == Artifact({}, b"")


def test_lists_and_deletes(cache: ArtifactCache) -> None:
    cache.put("a", "1", b"12", {"x": float("nan")})
    cache.put("b", "1", b"123")
    assert [(info.kind, info.key, info.size_bytes, info.meta) for info in cache.list()] == [
        ("a", "1", 2, {"x": None}),
        ("b", "1", 3, {}),
    ]
    assert [info.kind for info in cache.list("b")] == ["b"]
    assert cache.delete("a", "1")
    assert not cache.delete("a", "1")
    assert cache.list("a") == []


GOOD = {"n": 3, "big": 1e22, "small": 5e-324, "negative zero": -0.0, "text": "ü", "list": [1, 2.5, None, True]}


@pytest.mark.parametrize(
    "damage",
    [
        "payload = substr(payload, 1, 9)",
        "payload = payload || 'x'",
        "payload = set_byte(payload, 5, get_byte(payload, 5) # 1)",
        "payload = ''",
        """meta = jsonb_set(meta, '{n}', '4')""",
        """meta = jsonb_set(meta, '{big}', '1.000000000001e22')""",
        "meta = meta - 'text'",
        "meta = '{}'",
        "sha256 = reverse(sha256)",
        "sha256 = ''",
    ],
)
def test_a_damaged_row_is_logged_removed_and_not_used(
    cache: ArtifactCache, database: Database, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache.put("tables", "key1", b"0123456789", GOOD)
    cache.put("tables", "key2", b"other")
    assert cache.get("tables", "key1", whole) is not None
    with database.begin() as connection:
        assert connection.execute(text(f"UPDATE was.artifact SET {damage} WHERE key = 'key1'")).rowcount == 1
    assert cache.get("tables", "key1", whole) is None
    assert "cached tables key1 is damaged" in caplog.text
    assert [info.key for info in cache.list()] == ["key2"]
    assert cache.put("tables", "key1", b"0123456789", GOOD)
    assert cache.get("tables", "key1", whole) == Artifact(GOOD, b"0123456789")


def test_a_row_that_cannot_be_read_is_removed(cache: ArtifactCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.put("prices", "k", b"12345")
    assert cache.get("prices", "k", lambda row: np.frombuffer(row.payload, np.float64)) is None
    assert "ValueError: buffer size must be a multiple of element size" in caplog.text
    assert cache.list() == []


def test_a_login_that_may_only_read_uses_no_damaged_row(cache: ArtifactCache, database: Database) -> None:
    cache.put("prices", "k", b"12345")
    with database.begin() as connection:
        connection.execute(text("UPDATE was.artifact SET payload = '1234'"))
    with database.read_only() as reading:
        assert ArtifactCache(reading).get("prices", "k", whole) is None
    assert len(cache.list()) == 1


def test_too_much_is_refused(cache: ArtifactCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_PAYLOAD_BYTES", 3)
    with pytest.raises(StorageError, match="at most 3 bytes can be cached, got 4"):
        cache.put("a", "1", b"1234")


def test_many_may_put_the_same_key_at_once(cache: ArtifactCache) -> None:
    new: list[bool] = []
    threads = [threading.Thread(target=lambda: new.append(cache.put("a", "1", b"x" * 10000))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(new) == [False] * 4 + [True]
