"""Cached artifacts: histograms, tables and prices under the hash of everything that decides them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from was_search.errors import StorageError
from was_storage.database import Database
from was_storage.plain import plain
from was_storage.schema import artifact

MAX_PAYLOAD_BYTES = 400 * 2**20
"""Postgres takes values of 1 GB, and a payload travels as hexadecimal text."""


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

    A key names its content (:func:`was_search.protocol.content_hash` of everything that decides it), so the
    first put wins and later ones change nothing. Thread-safe; processes may put the same key at once.
    Every method raises TransientError where the connection is lost.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, kind: str, key: str) -> Artifact | None:
        """The artifact, or None where it is not cached.

        Raises:
            StorageError: the payload does not match its hash; the message names the row.
        """
        query = select(artifact.c.meta, artifact.c.payload, artifact.c.sha256)
        with self._database.begin() as connection:
            row = connection.execute(query.where(artifact.c.kind == kind, artifact.c.key == key)).one_or_none()
        if row is None:
            return None
        payload = bytes(row.payload)
        if hashlib.sha256(payload).hexdigest() != row.sha256:
            raise StorageError(
                f"cached {kind} {key} is damaged: its {len(payload)} bytes do not match their sha256; "
                "delete the row and compute it again"
            )
        return Artifact(dict(row.meta), payload)

    def put(self, kind: str, key: str, payload: bytes, meta: Mapping[str, Any] | None = None) -> bool:
        """Store ``payload``; returns whether it was new. An existing row is left as it is.

        Raises:
            StorageError: more than 400 MiB, or ``meta`` has no JSON form.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise StorageError(f"payload: at most {MAX_PAYLOAD_BYTES} bytes can be cached, got {len(payload)}")
        values = {
            "kind": kind,
            "key": key,
            "meta": plain(dict(meta or {})),
            "payload": payload,
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
        statement = insert(artifact).values(**values).on_conflict_do_nothing().returning(artifact.c.key)
        with self._database.begin() as connection:
            return connection.execute(statement).one_or_none() is not None

    def list(self, kind: str | None = None) -> list[ArtifactInfo]:
        """What is cached, of ``kind`` or at all, oldest first."""
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
