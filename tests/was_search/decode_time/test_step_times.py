"""Where a plan's gain ends, by the bytes that steps read."""

from __future__ import annotations

import pytest

from was_search.decode_time.step_times import StepTimes, gain_ends


def row(weight_bytes: int, kv_length: int = 100, cache_bytes: int = 200) -> StepTimes:
    times = {"p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0, "limit_ms": 1.0, "sparsity": 0.0, "live_channels": None}
    rates = {"tokens_per_s": 1.0, "loop_tokens_per_s": 1.0, "generate_tokens_per_s": None}
    return StepTimes("", 1, kv_length, weight_bytes=weight_bytes, cache_bytes=cache_bytes, **times, **rates)


@pytest.mark.parametrize("gain", [1.1, 1.5])
def test_at_that_length_the_ratio_of_bytes_is_the_gain(gain):
    dense, plan = row(10_000_000), row(5_000_000)
    positions = gain_ends(dense, plan, gain)
    assert positions is not None
    assert (10_000_000 + 2 * positions) / (5_000_000 + 2 * positions) == pytest.approx(gain, rel=1e-5)


def test_a_plan_that_saves_less_never_gains_so_much():
    assert gain_ends(row(1000), row(950), 1.1) is None
