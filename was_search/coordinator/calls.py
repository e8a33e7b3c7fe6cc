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
    """A shared value that is in this process already."""

    value: T


class Work(NamedTuple):
    """What a call does: its kind in words, whose calls take alike seconds a token, and its tokens (0: not known)."""

    kind: str
    tokens: float = 0.0


class Call(ABC, Generic[T]):
    """One call of a worker: a frozen dataclass of its arguments, which are pickled. Pure: repeating it is harmless.

    Attributes:
        name: its name in logs.
        words: its name in a sentence, such as "an evaluation".
    """

    name: ClassVar[str]
    words: ClassVar[str]

    @property
    def tokens(self) -> float:
        """Tokens that the call reads, by which paces are compared; 0 where they say nothing or are not known."""
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
        """Figures that the log shows of the call once it has ended with ``found``."""
        return {}
