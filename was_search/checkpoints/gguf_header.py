"""What a GGUF file says of itself, read with limits before anything else reads it.

A file comes from anywhere: counts and lengths in it may be absurd, and it may end too early. The layout is that of
ggml's documentation (docs/gguf.md of ggml-org/ggml), versions 2 and 3, little-endian: counts, keys with values, then of
every tensor its name, widths, type and place in what follows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from was_search.checkpoints.limits import MOST_OF_A_KIND
from was_search.errors import ModelError

MAGIC = b"GGUF"
"""How a GGUF file begins."""

MOST_HEADER_BYTES = 64 << 20
"""Greatest size of all keys, values and names: a vocabulary of 262,144 tokens with its merges takes a fifth of it."""

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_WIDTHS = 4

Scalar = str | int | float | bool


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: as ggml calls it.
        elements: number of its weights.
        kind: number of its type among ggml's.
        start: its first byte, from the beginning of the data.
    """

    name: str
    elements: int
    kind: int
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """Keys and tensors of a file.

    Attributes:
        values: the keys whose values are single numbers or texts.
        tensors: all tensors.
        data_start: first byte of the tensors' data.
    """

    values: dict[str, Scalar]
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def elements(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.elements for tensor in self.tensors)


def read_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at ``path``.

    Raises:
        ModelError: it cannot be read, is of another kind or version, ends too early, or counts absurdly.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_HEADER_BYTES)
    except OSError as error:
        raise ModelError(f"model: {path} cannot be read ({error.strerror})") from error
    try:
        return _header(_Reading(content), path)
    except struct.error as error:
        if len(content) == MOST_HEADER_BYTES:
            raise ModelError(
                f"model: {path} has more than {MOST_HEADER_BYTES >> 20} MiB of keys and names; no model's has"
            ) from error
        raise truncated(path) from error
    except UnicodeDecodeError as error:
        raise ModelError(f"model: {path} is damaged: a key or name in it is not UTF-8; copy it again") from error


def truncated(path: Path) -> ModelError:
    """What to raise of a file that ends too early."""
    return ModelError(f"model: {path} is damaged or truncated; copy it again")


class _Reading:
    """Takes values one after another from the beginning of a file; ``struct.error`` where it ends too early."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0

    def number(self, form: str) -> int:
        return int(self.scalar(form))

    def scalar(self, form: str) -> int | float | bool:
        value: int | float | bool
        (value,) = struct.unpack_from(f"<{form}", self._content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def skip(self, n_bytes: int) -> None:
        if n_bytes > len(self._content) - self.at:
            raise struct.error("too short")
        self.at += n_bytes

    def text(self) -> str:
        length = self.number("Q")
        start = self.at
        self.skip(length)
        return self._content[start : self.at].decode()


def _header(reading: _Reading, path: Path) -> GgufHeader:
    if reading._content[:4] != MAGIC:
        raise ModelError(f"model: {path} is no GGUF file, and no checkpoint's folder")
    reading.skip(4)
    version = reading.number("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"model: {path} is GGUF of version {version}, or of another byte order; versions "
            f"{' and '.join(map(str, _VERSIONS))} are read, little-endian"
        )
    n_tensors, n_values = reading.number("Q"), reading.number("Q")
    for what, count in (("tensors", n_tensors), ("keys", n_values)):
        if count > MOST_OF_A_KIND:
            raise ModelError(f"model: {path}: at most {MOST_OF_A_KIND} {what} are taken for possible, got {count:.3g}")
    values: dict[str, Scalar] = {}
    for _ in range(n_values):
        key = reading.text()
        found = _value(reading, reading.number("I"), key, path)
        if found is not None:
            values[key] = found
    tensors = tuple(_tensor(reading, path) for _ in range(n_tensors))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MOST_HEADER_BYTES:
        raise ModelError(f"model: {path}: general.alignment must be a small number of bytes, got {alignment!r}")
    return GgufHeader(values, tensors, -(-reading.at // alignment) * alignment)


def _value(reading: _Reading, kind: int, key: str, path: Path) -> Scalar | None:
    """A key's value; None for an array, which is passed over."""
    if kind in _SCALARS:
        return reading.scalar(_SCALARS[kind])
    if kind == _STRING:
        return reading.text()
    element = reading.number("I") if kind == _ARRAY else kind
    if element not in (*_SCALARS, _STRING) or kind != _ARRAY:
        raise ModelError(f"model: {path} is damaged, or of a newer kind: {key[:80]!r} has values of type {element}")
    count = reading.number("Q")
    if element != _STRING:
        reading.skip(count * struct.calcsize(f"<{_SCALARS[element]}"))
        return None
    if count > MOST_HEADER_BYTES:  # a text takes 8 bytes at least
        raise struct.error("too short")
    for _ in range(count):
        reading.skip(reading.number("Q"))
    return None


def _tensor(reading: _Reading, path: Path) -> GgufTensor:
    name, n_widths = reading.text(), reading.number("I")
    if n_widths > _MOST_WIDTHS:
        raise ModelError(f"model: {path} is damaged: {name[:80]!r} has {n_widths} dimensions")
    elements = prod(reading.number("Q") for _ in range(n_widths))
    return GgufTensor(name, elements, reading.number("I"), reading.number("Q"))
