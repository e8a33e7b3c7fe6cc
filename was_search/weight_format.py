"""How weights are held: as the checkpoint stores them, or rounded to 8 or 4 bits in groups."""

from __future__ import annotations

import re
from dataclasses import dataclass

from was_search.errors import ConfigError

AS_STORED = "none"
"""Value of ``--weights`` for weights that are not rounded."""

DEFAULT_GROUP = 128
_PATTERN = re.compile(r"int([48])(?::([1-9]\d{0,5}))?")


@dataclass(frozen=True)
class WeightFormat:
    """Weights of ``bits`` bits, with a scale and an offset for each ``group`` of outputs of an input channel.

    ``w = scale * q + offset`` with q in [0, 2**bits). Groups lie along the outputs: what a decode step reads of a kept
    channel is then one run of memory with its own scales, and a dropped channel's scales are not read either.
    """

    bits: int
    group: int = DEFAULT_GROUP

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"weights: bits must be 4 or 8, got {self.bits}")
        if self.group < 32 or self.group % 32:
            raise ConfigError(f"weights: the group must be a multiple of 32 outputs, got {self.group}")

    def __str__(self) -> str:
        return f"int{self.bits}:{self.group}"

    @property
    def words(self) -> str:
        """The format in words, for tables and logs."""
        return f"int{self.bits} weights in groups of {self.group} outputs"

    def row_bytes(self, width: int) -> int:
        """Bytes of the ``width`` weights of one input channel, scales and offsets with them."""
        return self.packed_bytes(width) + 4 * self.n_groups(width)

    def packed_bytes(self, width: int) -> int:
        return -(-width * self.bits // 8)

    def n_groups(self, width: int) -> int:
        return -(-width // self.group)

    @classmethod
    def parse(cls, text: str) -> WeightFormat | None:
        """The format that ``int8``, ``int4`` or, with a group, ``int4:64`` says; None for ``none``.

        Raises:
            ConfigError: anything else.
        """
        if text == AS_STORED:
            return None
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"weights: must be none, int8 or int4, or with a group of outputs as in int4:64, got {text!r}"
            )
        return cls(int(found[1]), int(found[2] or DEFAULT_GROUP))


def canonical(text: str) -> str:
    """``text`` with its group, so that two ways to write one format are equal.

    Raises:
        ConfigError: as :meth:`WeightFormat.parse`.
    """
    return str(WeightFormat.parse(text) or AS_STORED)


def describe(text: str) -> str:
    """A format's name in words, for messages."""
    found = WeightFormat.parse(text)
    return "weights as stored" if found is None else found.words


def brief(text: str) -> str:
    """A format's name for rows of a table: as ``int4:128 weights``, or ``weights as stored``."""
    return describe(text) if text == AS_STORED else f"{text} weights"
