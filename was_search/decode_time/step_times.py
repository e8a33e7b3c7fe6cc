"""Decoding, measured: a step's time, what it reads, and the tokens a second that a caller gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """One way to decode, measured.

    Attributes:
        name: ``dense``, ``dense, compiled`` or ``plan``; with rounded weights followed by their format.
        batch: rows that decode together.
        kv_length: positions in the cache.
        p20_ms: a step's time, 20th percentile; ``p50_ms`` and ``p80_ms`` are the 50th and 80th.
        tokens_per_s: tokens of all rows, by the step alone.
        loop_tokens_per_s: the same of the decoding loop, after the first token.
        generate_tokens_per_s: the same of transformers' ``generate`` as users call it: a dynamic cache, or for compiled
            steps a static one, with which transformers compiles them on a GPU; None: that was not timed.
        weight_bytes: bytes of live channels' weights and the head.
        cache_bytes: bytes of the cache's keys and values.
        limit_ms: time to read both at the bandwidth measured in the same run.
        sparsity: sparsity counted in decode steps.
        live_channels: kept channels of all projections; None: all.
        predicted_ms: time that the settings' profile predicts at the sparsities counted; None where it has none.
    """

    name: str
    batch: int
    kv_length: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    tokens_per_s: float
    loop_tokens_per_s: float
    generate_tokens_per_s: float | None
    weight_bytes: int
    cache_bytes: int
    limit_ms: float
    sparsity: float
    live_channels: float | None
    predicted_ms: float | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes of weights and cache."""
        return self.weight_bytes + self.cache_bytes


def gain_ends(dense: StepTimes, plan: StepTimes, gain: float) -> int | None:
    """Positions in the cache from which a step of ``plan`` is under ``gain`` times as fast, by the bytes read.

    None where it is so with an empty cache already.
    """
    each = plan.cache_bytes / plan.kv_length
    positions = (dense.weight_bytes - gain * plan.weight_bytes) / ((gain - 1.0) * each)
    return round(positions) if positions > 0 else None
