"""Cached artifacts: histograms, tables and prices under the hash of everything that decides them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from was_search.errors import StorageError
from was_storage.server.database import Database
from was_storage.server.plain import plain
from was_storage.server.schema import artifact

MAX_PAYLOAD_BYTES = 400 * 2**20
"""Largest payload: Postgres takes values of 1 GB, and a payload travels as hexadecimal text."""

T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """A cached payload, as it was put.

    Attributes:
        meta: what the maker wrote beside it, in JSON's types.
        payload: the bytes, verified.
    """

    meta: dict[str, Any]
    payload: bytes


@dataclass(frozen=True)
class ArtifactInfo:
    """One row of the cache without its payload."""

    kind: str
    key: str
    meta: dict[str, Any]
    size_bytes: int
    created_at: datetime


class ArtifactCache:
    """Immutable payloads by kind and key.

    A key names its content (:func:`was_search.texts.protocol.content_hash` of everything that decides it), so the
    first put wins and later ones change nothing. Thread-safe; processes may put the same key at once.
    Every method raises TransientError where the connection is lost.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, kind: str, key: str, read: Callable[[Artifact], T]) -> T | None:
        """What ``read`` makes of the artifact; None where it is not cached.

        A row that does not match its hash, or of which ``read`` raises an error (another length, shape or type), is
        logged and removed, so that the caller computes it again; it is never used.
        """
        query = select(artifact.c.meta, artifact.c.payload, artifact.c.sha256)
        with self._database.begin() as connection:
            row = connection.execute(query.where(artifact.c.kind == kind, artifact.c.key == key)).one_or_none()
        if row is None:
            return None
        found = Artifact(dict(row.meta), bytes(row.payload))
        try:
            if row.sha256 != _hash(found):
                raise StorageError(f"its {len(found.payload)} bytes do not match their sha256")
            return read(found)
        except Exception as error:  # whatever a reader raises on what it was not made for
            _logger.warning(
                "cached %s %s is damaged (%s: %s); it is removed and computed again",
                kind,
                key,
                type(error).__name__,
                str(error)[:200],
            )
        self._remove(kind, key, row.sha256)
        return None

    def _remove(self, kind: str, key: str, sha256: str) -> None:
        """Remove the row, unless another process has put another one in its place."""
        c = artifact.c
        try:
            with self._database.begin() as connection:
                connection.execute(delete(artifact).where(c.kind == kind, c.key == key, c.sha256 == sha256))
        except StorageError as error:  # a login that may only read
            _logger.warning("cached %s %s could not be removed: %s", kind, key, error)

    def put(self, kind: str, key: str, payload: bytes, meta: Mapping[str, Any] | None = None) -> bool:
        """Store ``payload``; returns whether it was new. An existing row is left as it is.

        Raises:
            StorageError: more than 400 MiB, or ``meta`` has no JSON form.
        """
        statement = insert(artifact).values(**_row(kind, key, payload, meta)).on_conflict_do_nothing()
        with self._database.begin() as connection:
            return connection.execute(statement.returning(artifact.c.key)).one_or_none() is not None

    def replace(self, kind: str, key: str, payload: bytes, meta: Mapping[str, Any] | None = None) -> None:
        """Store ``payload`` whatever is there: for the few kinds whose key does not name the content.

        Raises:
            StorageError: as :meth:`put`.
        """
        values = _row(kind, key, payload, meta)
        changed = {name: values[name] for name in ("meta", "payload", "sha256")}
        statement = insert(artifact).values(**values)
        with self._database.begin() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["kind", "key"], set_=changed))

    def list(self, kind: str | None = None) -> list[ArtifactInfo]:
        """What is cached, oldest first: all, or only of ``kind``."""
        c = artifact.c
        query = select(c.kind, c.key, c.meta, func.octet_length(c.payload).label("size_bytes"), c.created_at)
        if kind is not None:
            query = query.where(c.kind == kind)
        with self._database.begin() as connection:
            rows = connection.execute(query.order_by(c.created_at, c.kind, c.key)).all()
        return [ArtifactInfo(r.kind, r.key, dict(r.meta), r.size_bytes, r.created_at) for r in rows]

    def delete(self, kind: str, key: str) -> bool:
        """Remove the row; returns whether it was there."""
        statement = delete(artifact).where(artifact.c.kind == kind, artifact.c.key == key)
        with self._database.begin() as connection:
            return connection.execute(statement).rowcount > 0


def _row(kind: str, key: str, payload: bytes, meta: Mapping[str, Any] | None) -> dict[str, Any]:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise StorageError(f"payload: at most {MAX_PAYLOAD_BYTES} bytes can be cached, got {len(payload)}")
    stored = Artifact(plain(dict(meta or {})), payload)
    return {"kind": kind, "key": key, "meta": stored.meta, "payload": payload, "sha256": _hash(stored)}


def _hash(found: Artifact) -> str:
    meta = json.dumps(_canonical(found.meta), sort_keys=True).encode()
    return hashlib.sha256(meta + b"\0" + found.payload).hexdigest()


def _canonical(value: Any) -> Any:
    """``value`` with numbers as text: Postgres gives 1e22 back as a whole number, and -0.0 without its sign."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return repr(float(value) + 0.0) if isinstance(value, int | float) and not isinstance(value, bool) else value
