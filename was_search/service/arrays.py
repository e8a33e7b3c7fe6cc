"""Arrays as npy bytes, never pickled, and read only if shape and type are those expected."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt


def pack_array(array: npt.NDArray[Any]) -> bytes:
    """An array as npy bytes, never pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def unpack_array(payload: bytes, shape: tuple[int | None, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array from :func:`pack_array`, if it is of this ``shape`` (None: any width) and ``dtype``.

    Raises:
        ValueError: another shape, type or length; no memory is allocated for what a wrong header claims.
    """
    stream = io.BytesIO(payload)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version must be 1.0, got {version}")
    there, by_columns, kind = np.lib.format.read_array_header_1_0(stream)
    fits = len(there) == len(shape) and all(want in (None, got) for want, got in zip(shape, there, strict=True))
    if not fits or by_columns or kind != np.dtype(dtype):
        raise ValueError(f"{np.dtype(dtype)} {shape} is wanted, got {kind} {there}")
    if len(payload) - stream.tell() != math.prod(there) * kind.itemsize:
        raise ValueError(f"{kind} {there} is claimed, got {len(payload) - stream.tell()} bytes")
    return np.frombuffer(payload, kind, offset=stream.tell()).reshape(there).copy()
