"""Which of several ways to do the same is the fastest here: by the clock, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_LEAST_ROUNDS, _MOST_ROUNDS, _ENOUGH_SECONDS = 4, 10, 0.06


def quickest(*calls: Callable[[], Any]) -> list[float]:
    """Seconds of the shortest of a few of each of ``calls``, which take turns: what disturbs one disturbs all."""
    for call in calls:
        call()
    fastest, spent = [float("inf")] * len(calls), 0.0
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_ROUNDS and spent > _ENOUGH_SECONDS:
            break
        for i, call in enumerate(calls):
            started = time.perf_counter()
            call()
            took = time.perf_counter() - started
            fastest[i], spent = min(fastest[i], took), spent + took
    return fastest
