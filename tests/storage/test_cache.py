"""The artifact cache."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from was_search.errors import StorageError
from was_storage import cache as cache_module
from was_storage.cache import Artifact, ArtifactCache
from was_storage.database import Database

pytestmark = pytest.mark.postgres


@pytest.fixture
def cache(database: Database) -> ArtifactCache:
    with database.begin() as connection:
        connection.execute(text("DELETE FROM was.artifact"))
    return ArtifactCache(database)


def test_the_first_put_wins(cache: ArtifactCache) -> None:
    payload = bytes(range(256)) * 1000
    assert cache.get("histograms", "k") is None
    assert cache.put("histograms", "k", payload, {"n_blocks": 2})
    assert not cache.put("histograms", "k", b"other")
    assert cache.get("histograms", "k") == Artifact({"n_blocks": 2}, payload)
    assert cache.get("tables", "k") is None


def test_an_empty_payload_is_a_payload(cache: ArtifactCache) -> None:
    cache.put("prices", "k", b"")
    assert cache.get("prices", "k") == Artifact({}, b"")


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


def test_a_damaged_row_is_named(cache: ArtifactCache, database: Database) -> None:
    cache.put("tables", "key1", b"good")
    with database.begin() as connection:
        connection.execute(text("UPDATE was.artifact SET payload = 'bad'"))
    with pytest.raises(StorageError, match=r"cached tables key1 is damaged: .* delete the row"):
        cache.get("tables", "key1")


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
