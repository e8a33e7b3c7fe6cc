"""What a pool's workers are asked to do: a call, the values that calls share, and the work that it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from was_search.masks.masked_model import MaskedModel

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Shared(Protocol[T_co]):
    """A value that many calls carry and that goes to each worker once: what ``WorkerPool.share`` returns."""

    @property
    def value(self) -> T_co: ...


@dataclass(frozen=True, eq=False)
class Held(Generic[T]):
    """A shared value that lies in this process."""

    value: T


class Work(NamedTuple):
    """What a call does: ``kind`` of it in words, whose seconds a token are alike, and its tokens (0: not known)."""

    kind: str
    tokens: float = 0.0


class Call(ABC, Generic[T]):
    """One call of a worker: a frozen dataclass of its arguments, which are pickled. Pure: repeating it is harmless.

    Attributes:
        name: for logs.
        words: the same in a sentence, such as "an evaluation".
    """

    name: ClassVar[str]
    words: ClassVar[str]

    @property
    def tokens(self) -> float:
        """What it goes through, by which workers' paces are compared; 0 where that says nothing or is not known."""
        return 0.0

    @property
    def work(self) -> Work:
        return Work(self.words, self.tokens)

    @abstractmethod
    def run(self, model: MaskedModel) -> T:
        """The result, on a worker.

        Raises:
            NotFiniteError: the model gave NaN or infinite numbers.
        """

    def figures(self, found: T) -> dict[str, Any]:
        """What the log says of a call that has ended."""
        return {}
