"""The one way in which a step is cached: a stored value is taken, a missing one is made and stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy.typing as npt

from was_search.service.arrays import pack_array, unpack_array
from was_search.service.reports.progress import Reporter

if TYPE_CHECKING:
    from was_storage.studies.cache import Artifact, ArtifactCache

T = TypeVar("T")


class CacheEntry(Protocol[T]):
    """Where a value may be stored."""

    def get(self) -> T | None: ...

    def put(self, value: T) -> None: ...


@dataclass(frozen=True)
class CachedRow(Generic[T]):
    """A row of the database's cache.

    Attributes:
        cache: the database's.
        kind: kind of the artifact.
        key: names everything that decides the value.
        read: makes the value of the row; a row on which it raises an error is not used.
        pack: the value's bytes and its metadata.
    """

    cache: ArtifactCache
    kind: str
    key: str
    read: Callable[[Artifact], T]
    pack: Callable[[T], tuple[bytes, dict[str, Any]]]

    def get(self) -> T | None:
        return self.cache.get(self.kind, self.key, self.read)

    def put(self, value: T) -> None:
        self.cache.put(self.kind, self.key, *self.pack(value))


def array_row(
    cache: ArtifactCache, kind: str, key: str, shape: tuple[int | None, ...], dtype: npt.DTypeLike
) -> CachedRow[npt.NDArray[Any]]:
    """A row that holds an array of ``shape`` (None: any width) and ``dtype``."""
    return CachedRow(
        cache, kind, key, lambda row: unpack_array(row.payload, shape, dtype), lambda value: (pack_array(value), {})
    )


def cached(
    entry: CacheEntry[T],
    make: Callable[[], T],
    reporter: Reporter | None = None,
    name: str = "",
    detail: str | Callable[[T], str] = "",
) -> T:
    """The value of ``entry``; where there is none, ``make`` makes it and it is put there.

    A value that was found is shown by ``reporter`` (None: by nobody) as the phase ``name``, with ``detail``. ``make``
    itself shows the phase that it runs.
    """
    started = time.perf_counter()
    found = entry.get()
    if found is None:
        made = make()
        entry.put(made)
        return made
    if reporter is not None:
        reporter.cached(name, detail if isinstance(detail, str) else detail(found), time.perf_counter() - started)
    return found
