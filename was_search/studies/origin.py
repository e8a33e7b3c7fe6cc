"""Where a slot's vector comes from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OriginKind(StrEnum):
    """What made a vector."""

    NONE = ""
    SEED = "seed"
    SAMPLER = "sampler"
    DESCENT = "descent"
    OTHER = "other"


@dataclass(frozen=True)
class Origin:
    """Where a vector comes from: a seed, a descent of the search, or its sampler. It is stored as text:

    - ``seed:NAME`` and ``sampler:NAME``;
    - ``descent:EPOCH:CHAIN``, and ``descent:EPOCH:mean`` for the mean of an epoch's chains;
    - "" before a vector is chosen; any other text is of kind OTHER, such as that of a plan that no study has made.

    Attributes:
        kind: seed, descent, sampler, none yet or other.
        name: name of the seed or the sampler; the whole text of kind OTHER.
        epoch: epoch of a descent, from 0.
        chain: chain of a descent, from 0; None for the mean.
    """

    kind: OriginKind = OriginKind.NONE
    name: str = ""
    epoch: int = 0
    chain: int | None = None

    @classmethod
    def seed(cls, name: str) -> Origin:
        return cls(OriginKind.SEED, name)

    @classmethod
    def sampler(cls, name: str) -> Origin:
        return cls(OriginKind.SAMPLER, name)

    @classmethod
    def descent(cls, epoch: int, chain: int | None) -> Origin:
        return cls(OriginKind.DESCENT, epoch=epoch, chain=chain)

    @classmethod
    def parse(cls, text: str) -> Origin:
        """The origin whose text is ``text``."""
        kind, _, rest = text.partition(":")
        if not text:
            return cls()
        if kind in (OriginKind.SEED, OriginKind.SAMPLER):
            return cls(OriginKind(kind), rest)
        epoch, _, chain = rest.partition(":")
        if kind == OriginKind.DESCENT and epoch.isdecimal() and (chain == "mean" or chain.isdecimal()):
            return cls.descent(int(epoch), None if chain == "mean" else int(chain))
        return cls(OriginKind.OTHER, text)

    def __str__(self) -> str:
        if self.kind is OriginKind.DESCENT:
            return f"{self.kind}:{self.epoch}:{'mean' if self.chain is None else self.chain}"
        return self.name if self.kind in (OriginKind.NONE, OriginKind.OTHER) else f"{self.kind}:{self.name}"
