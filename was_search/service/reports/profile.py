"""The tables of a latency profile."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from was_search.decode_time.profile import LatencyProfile
from was_search.decode_time.time_budget import speedups
from was_search.service.reports.progress import Reporter

SPREAD_WARNED = 0.02
"""Profiles noisier than this are reported as such."""


def show_profile(
    reporter: Reporter, found: LatencyProfile, comparison: list[dict[str, float]], output: Path | None
) -> None:
    """Show what a profile predicts, how well it does, and where it was written."""
    levels = (0.0, 0.25, 0.5, 0.6, 0.75, 0.9)
    flat = np.ones(found.shape.params.shape)
    seconds = found.predict(np.stack([level * flat for level in levels]))
    reporter.table(
        "Predicted decoding step, all projections alike",
        ["sparsity", "ms", "over the dense step"],
        [
            [f"{100 * s:g} %", f"{1e3 * t:.3f}", f"{found.speedup(t):.2f}x"]
            for s, t in zip(levels, seconds, strict=True)
        ],
        caption=found.describe(),
    )
    if comparison:
        reporter.table(
            f"{len(comparison)} random vectors that took no part in the profile",
            ["sparsity", "predicted ms", "measured ms", "error"],
            [
                [
                    f"{100 * row['sparsity']:.1f} %",
                    f"{row['predicted_ms']:.3f}",
                    f"{row['measured_ms']:.3f}",
                    f"{100 * row['error']:+.2f} %",
                ]
                for row in comparison
            ],
        )
    if found.check:
        reporter.note(
            f"{found.check['vectors']} unseen vectors: error at most {100 * found.check['max_error']:.2f} %, "
            f"{100 * found.check['mean_error']:.2f} % in the mean"
        )
    if found.spread > SPREAD_WARNED:
        reporter.note(
            f"the same step took {100 * found.spread:.1f} % more or less from one time to the next: predictions are no "
            "better than that; measure with nothing else on the device, and with --again"
        )
    least, most = speedups(found)
    reporter.note(f"speed-ups from {least:.3f} (nothing skipped) to {most:.3f} can be asked for")
    if output is not None:
        reporter.note(f"profile: {output}")
    value = {**found.summary(), "speedups": [least, most], "output": None if output is None else str(output)}
    reporter.result({"profile": value, "rows": comparison})
