"""Python's garbage collector, kept from looking through what imports make."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Around imports of large packages: they make millions of objects and no garbage.

    Looking through them again and again takes a fifth of the time that torch and transformers take to import.
    """
    ran = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ran:
            gc.enable()
