"""Shared values in Ray's memory: put there once by the pool, fetched by a worker as long as its calls carry them.

A worker also serves without Ray, in benchmarks: Ray is imported where a value is put or fetched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar, cast

from was_search.coordinator.calls import Call, Held
from was_search.errors import TransientError

T = TypeVar("T")
CallT = TypeVar("CallT", bound=Call[Any])


@dataclass(eq=False)
class RayShared(Generic[T]):
    """A value in Ray's memory. Only its reference travels; whoever put it there has the value itself too."""

    reference: Any
    here: tuple[T, ...] = ()

    @classmethod
    def put(cls, value: T) -> RayShared[T]:
        import ray

        return cls(ray.put(value), (value,))

    def forget(self) -> None:
        """Let go of the reference, before the Ray that it belongs to goes."""
        self.reference = None

    def put_again(self) -> None:
        """Put the value into the memory of a new Ray."""
        import ray

        self.reference = ray.put(self.here[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"reference": self.reference, "here": ()}

    @property
    def value(self) -> T:
        """The value, fetched where it is not here.

        Raises:
            TransientError: it is lost with the node that held it.
        """
        if self.here:
            return self.here[0]
        import ray
        from ray.exceptions import RayError

        try:
            found: T = ray.get(self.reference)
        except RayError as error:
            raise TransientError(f"a shared value cannot be fetched ({type(error).__name__}: {error})") from error
        return found


class SharedMemory:
    """A worker's memory of the values that its last call carried.

    Consecutive calls of a search carry the same values, so what is computed from them once, such as sums of
    histograms, is kept.
    """

    def __init__(self) -> None:
        self._held: dict[Any, Held[Any]] = {}

    def resolved(self, call: CallT) -> CallT:
        """``call`` with its shared values in this process; values that it does not carry are forgotten."""
        arguments: Any = call
        values = {field.name: getattr(call, field.name) for field in fields(arguments)}
        carried = {name: value for name, value in values.items() if isinstance(value, RayShared)}
        references = {shared.reference: shared for shared in carried.values()}
        before, self._held = self._held, {}
        for reference, shared in references.items():
            self._held[reference] = before.get(reference) or Held(shared.value)
        return cast(CallT, replace(arguments, **{name: self._held[s.reference] for name, s in carried.items()}))
