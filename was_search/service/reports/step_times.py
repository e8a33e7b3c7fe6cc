"""The tables of decoding: a step for each number of rows and length of the cache, and tokens a second of them all."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from was_search.decode_time.step_times import StepTimes, gain_ends
from was_search.service.reports.progress import Reporter

if TYPE_CHECKING:
    from was_search.service.placement import Placement

_SMALL_GAIN = 1.1


def show_steps(reporter: Reporter, found: list[StepTimes], *, place: Placement, backend: str, bandwidth: float) -> None:
    """Show decoding, dense beside a plan.

    Args:
        reporter: shows the tables.
        found: what was measured; the first of a number of rows and a length is what speeds are relative to.
        place: where they ran.
        backend: backend of the sparse runtime, in words.
        bandwidth: measured bandwidth, bytes per second.
    """
    cases = [list(rows) for _, rows in groupby(sorted(found, key=_case), key=_case)]
    for rows in cases:
        _show_step(reporter, rows)
    shown = [cells for rows in cases for cells in _rates(rows)]
    reporter.table(
        "Tokens a second, of all rows",
        ["rows, positions", "", "step alone", "decoding loop", "generate", "loop, over dense"],
        shown,
        caption="after the first token; generate as transformers is called, with a dynamic cache, compiled: static",
    )
    reporter.note(
        f"{place.device}, {place.dtype}, {backend}; the limit is reading those bytes "
        f"at {bandwidth / 1e9:.1f} GB/s, measured here"
    )
    for rows in cases[:: max(1, len({row.kv_length for row in found}))]:
        _show_end_of_gain(reporter, rows)
    value: dict[str, Any] = {"bandwidth_bytes_per_s": bandwidth, "backend": backend}
    reporter.result(value | {"rows": [asdict(row) | {"read_bytes": row.read_bytes} for row in found]})


def _case(row: StepTimes) -> tuple[int, int]:
    return row.batch, row.kv_length


def _words(row: StepTimes) -> str:
    return f"{row.batch} row{'s' if row.batch > 1 else ''}, {row.kv_length} positions"


def _show_step(reporter: Reporter, rows: list[StepTimes]) -> None:
    predicted = any(row.predicted_ms is not None for row in rows)
    shown = [
        [
            row.name,
            f"{100 * row.sparsity:.1f} %",
            "all" if row.live_channels is None else f"{row.live_channels:.0f}",
            f"{row.p50_ms:.3f} ({row.p20_ms:.3f} to {row.p80_ms:.3f})",
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.cache_bytes / 1e6:.1f}",
            f"{100 * row.limit_ms / row.p50_ms:.0f} %",
            f"{rows[0].p50_ms / row.p50_ms:.2f}x",
            *([f"{row.predicted_ms:.3f}" if row.predicted_ms is not None else ""] if predicted else []),
        ]
        for row in rows
    ]
    columns = ["", "skipped", "live channels", "ms, median (20 to 80 %)", "weights, MB", "cache, MB", "of the limit"]
    reporter.table(
        f"One decode step, {_words(rows[0])} in the cache",
        [*columns, "speed", *["predicted ms"] * predicted],
        shown,
    )


def _rates(rows: list[StepTimes]) -> list[list[str]]:
    return [
        [
            f"{row.batch}, {row.kv_length}",
            row.name,
            f"{row.tokens_per_s:.1f}",
            f"{row.loop_tokens_per_s:.1f}",
            "" if row.generate_tokens_per_s is None else f"{row.generate_tokens_per_s:.1f}",
            f"{row.loop_tokens_per_s / rows[0].loop_tokens_per_s:.2f}x",
        ]
        for row in rows
    ]


def _show_end_of_gain(reporter: Reporter, rows: list[StepTimes]) -> None:
    """Where a plan stops paying: the cache is read whole, however little of the weights is."""
    if rows[-1].live_channels is None:
        return
    ends = gain_ends(rows[0], rows[-1], _SMALL_GAIN)
    each = f"{rows[0].batch} row{'s' if rows[0].batch > 1 else ''}"
    said = "at any length" if ends is None else f"from about {ends} positions on"
    reporter.note(f"by the bytes read, {each}: a plan's step is under {_SMALL_GAIN:.1f}x as fast {said}")
