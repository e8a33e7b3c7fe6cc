"""The table that compares a run's methods, and what to type next."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from was_search.decode_time.profile import LatencyProfile
from was_search.masks.intervals import Interval
from was_search.service.reports.distance import DISTANCE_COLUMNS, DISTANCE_MEANING, distance_cells
from was_search.service.reports.progress import Reporter
from was_search.service.reports.study_report import GAP_MEANING
from was_search.texts.protocol import perplexity

if TYPE_CHECKING:
    from was_search.service.steps.comparison import Row

SEED_ROW = "fisher seed"
STEP_COLUMNS = ("step\nms", "step\nspeed")


def show_comparison(
    reporter: Reporter, rows: list[Row], budget: str, profile: LatencyProfile | None, protocols: dict[str, str]
) -> None:
    """Show the table of a run's methods, each at its own operating point.

    Args:
        reporter: shows the table.
        rows: the methods.
        budget: the budget in words.
        profile: the profile that predicted their steps; None: none did.
        protocols: the splits' protocols in words, by name.
    """
    timed = profile is not None
    body = []
    for row in rows:
        achieved = (row.calibration_achieved, row.search.achieved, row.test.achieved)
        body.append(
            [
                row.name,
                f"{100 * row.nominal:.2f}",
                " ".join(f"{100 * v:.1f}" for v in achieved),
                f"{row.search.evaluation.loss_nats:.4f}",
                f"{row.test.evaluation.loss_nats:.4f}",
                f"{perplexity(row.test.evaluation.loss_nats):.3f}",
                *distance_cells(row.test.evaluation),
                f"{row.gap_nats:+.4f}" if row.nominal else "",
                narrow(row.against_uniform),
                narrow(row.against_seed),
                *step_cells(row.step),
            ]
        )
    reporter.table(
        f"Results at a budget of {budget}",
        [
            "",
            "nomi-\nnal %",
            "achieved %\nc/s/t",
            "search\nnats",
            "test\nnats",
            "test\nppl",
            *DISTANCE_COLUMNS,
            "gap",
            "test -\nuniform",
            f"test -\n{SEED_ROW}",
            *(STEP_COLUMNS if timed else ()),
        ],
        body,
        caption="\n".join(
            [
                "nats per token; achieved sparsity on the calibration, search and test split",
                "test - X: difference on the test split, paired by sequence, 95 % interval; negative is better",
                f"{DISTANCE_MEANING}; on the test split",
                GAP_MEANING,
                *([] if profile is None else [step_caption(profile)]),
                *(f"{split}: {protocol}" for split, protocol in protocols.items()),
            ]
        ),
    )


def step_cells(step: dict[str, float] | None) -> list[str]:
    """Cells of a predicted step for :data:`STEP_COLUMNS`; empty where there is none."""
    return [] if step is None else [f"{step['predicted_ms']:.3f}", f"{step['predicted_speedup']:.2f}x"]


def step_caption(profile: LatencyProfile) -> str:
    """Caption that explains :data:`STEP_COLUMNS`."""
    return f"step: one decoding step, predicted at the sparsities achieved on the test split: {profile.describe()}"


def narrow(interval: Interval | None) -> str:
    """An interval for a table's narrow column, which breaks in its middle at most; "" for none."""
    return "" if interval is None else str(interval).replace("± ", "±")


def next_commands(storage: str, study: str, folder: Path) -> list[str]:
    """Commands worth trying after a run, as they can be typed here."""
    started_as = Path(sys.argv[0])
    if shutil.which("was-search"):
        program = "was-search"
    elif started_as.name == "was-search":
        program = os.path.relpath(started_as)
    else:
        program = "python -m was_search"
    elsewhere = "" if storage == "embedded" else " --storage URL"
    return [
        f"{program} dashboard --study {study}{elsewhere}",
        f"{program} status --study {study}{elsewhere}",
        f"{program} evaluate --plan {folder} --split search",
        f"{program} generate --plan {folder} --prompt 'def main():' --max-new-tokens 64",
    ]
