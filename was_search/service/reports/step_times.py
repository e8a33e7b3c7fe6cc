"""The table of decode steps."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from was_search.service.reports.progress import Reporter

if TYPE_CHECKING:
    from was_search.service.placement import Placement
    from was_search.service.steps.step_times import StepTimes


def show_steps(
    reporter: Reporter,
    found: list[StepTimes],
    *,
    place: Placement,
    backend: str,
    bandwidth: float,
    batch: int,
    kv_length: int,
) -> None:
    """Show one decode step, dense beside a plan.

    Args:
        reporter: shows the table.
        found: the steps; speeds are relative to the first.
        place: where they ran.
        backend: backend of the sparse runtime, in words.
        bandwidth: measured bandwidth, bytes per second.
        batch: number of rows.
        kv_length: positions in the cache.
    """
    predicted = any(row.predicted_ms is not None for row in found)
    rows = [
        [
            row.name,
            f"{100 * row.sparsity:.1f} %",
            "all" if row.live_channels is None else f"{row.live_channels:.0f}",
            f"{row.p50_ms:.3f} ({row.p20_ms:.3f} to {row.p80_ms:.3f})",
            f"{row.tokens_per_s:.1f}",
            f"{row.read_bytes / 1e6:.1f}",
            f"{100 * row.limit_ms / row.p50_ms:.0f} %",
            f"{found[0].p50_ms / row.p50_ms:.2f}x",
            *([f"{row.predicted_ms:.3f}" if row.predicted_ms is not None else ""] if predicted else []),
        ]
        for row in found
    ]
    reporter.table(
        f"One decode step, {batch} row{'s' if batch > 1 else ''}, {kv_length} positions in the cache",
        ["", "skipped", "live channels", "ms, median (20 to 80 %)", "tokens/s", "MB read", "of the limit", "speed"]
        + ["predicted ms"] * predicted,
        rows,
    )
    reporter.note(
        f"{place.device}, {place.dtype}, {backend}; the limit is reading those bytes "
        f"at {bandwidth / 1e9:.1f} GB/s, measured here"
    )
    value: dict[str, Any] = {"bandwidth_bytes_per_s": bandwidth, "backend": backend, "rows": [asdict(r) for r in found]}
    reporter.result(value)
