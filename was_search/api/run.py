"""All steps, skipping what is cached, and the table that compares the winner with its baselines."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from was_search.api.calibrate import OperatingPoint, calibrate, operating_point
from was_search.api.context import Context
from was_search.api.export import Figures, Request, export, measure
from was_search.api.search import SearchResult, search
from was_search.plan import Plan
from was_search.protocol import perplexity
from was_search.statistics import Interval, paired_interval


@dataclass(frozen=True)
class Row:
    """One method on the search and the test split, at its own operating point.

    ``nominal`` is the parameter-weighted sparsity asked for; intervals are None where there is nothing to compare.
    """

    name: str
    nominal: float
    search: Figures
    test: Figures
    calibration_achieved: float
    against_uniform: Interval | None
    against_above: Interval | None


@dataclass(frozen=True)
class RunResult:
    """What ``run`` made: the search, the plan's folder and the comparison."""

    search: SearchResult
    plan: Path | None
    rows: list[Row]


def run(context: Context) -> RunResult:
    """Calibrate, seed, search, export and compare; an interrupted search ends the run after its report."""
    found = search(context)
    if found.drained:
        return RunResult(found, None, [])
    folder = export(context, found)
    rows = compare(context, found, Plan.load(folder))
    show(context, rows)
    context.reporter.result(
        {
            "study": found.study,
            "plan": str(folder),
            "rows": [
                {
                    "name": row.name,
                    "nominal_sparsity": row.nominal,
                    "search": row.search.to_json(context),
                    "test": row.test.to_json(context),
                    "test_against_uniform": vars(row.against_uniform) if row.against_uniform else None,
                    "test_against_row_above": vars(row.against_above) if row.against_above else None,
                }
                for row in rows
            ],
        }
    )
    return RunResult(found, folder, rows)


def compare(context: Context, found: SearchResult, plan: Plan) -> list[Row]:
    """Dense, the three seeds and the exported plan on the search and test splits.

    Every vector has thresholds re-calibrated at its own point, so all achieve the same sparsity on the calibration
    split and are compared at it.
    """
    calibration = calibrate(context)
    vectors = {("fisher seed" if seed.name == "fisher" else seed.name): seed.sparsities for seed in found.seeds}
    is_seed = plan.provenance["origin"].startswith("seed:")
    vectors[f"best (slot {plan.provenance['slot']}{', a seed' if is_seed else ''})"] = plan.sparsities
    points: dict[str, OperatingPoint | None] = {"dense": None}
    for name, sparsities in vectors.items():
        points[name] = operating_point(context, calibration, sparsities, name)
    requests = [Request(name, split, point) for name, point in points.items() for split in ("search", "test")]
    figures = measure(context, calibration, requests)
    rows: dict[str, Row] = {}
    for i, (name, point) in enumerate(points.items()):
        on_search, on_test = figures[2 * i : 2 * i + 2]
        rows[name] = Row(
            name,
            0.0 if point is None else calibration.shape.sparsity(vectors[name]),
            on_search,
            on_test,
            0.0 if point is None else calibration.shape.sparsity(point.achieved),
            _interval(on_test, rows.get("uniform")),
            _interval(on_test, list(rows.values())[-1] if rows else None),
        )
    return list(rows.values())


def show(context: Context, rows: list[Row]) -> None:
    """Print the comparison with its protocols."""
    body = []
    for row in rows:
        body.append(
            [
                row.name,
                f"{100 * row.nominal:.2f}",
                " ".join(f"{100 * v:.1f}" for v in (row.calibration_achieved, row.search.achieved, row.test.achieved)),
                f"{row.search.evaluation.loss_nats:.4f}",
                f"{row.test.evaluation.loss_nats:.4f}",
                f"{perplexity(row.test.evaluation.loss_nats):.3f}",
                str(row.against_uniform or ""),
                str(row.against_above or ""),
            ]
        )
    context.reporter.table(
        f"Results at a budget of {100 * context.settings.target:g} %",
        [
            "",
            "nominal %",
            "achieved % c/s/t",
            "search nats",
            "test nats",
            "test ppl",
            "test - uniform",
            "test - row above",
        ],
        body,
        caption="\n".join(
            [
                "nats per token; achieved sparsity on the calibration, search and test split",
                "test - X: difference on the test split, paired by sequence, 95 % interval; negative is better",
                *(
                    f"{split}: {context.tokens(split).protocol.describe()}"
                    for split in ("calibration", "search", "test")
                ),
            ]
        ),
    )


def _interval(test: Figures, baseline: Row | None) -> Interval | None:
    if baseline is None or len(test.evaluation.losses) < 2:
        return None
    return paired_interval(test.evaluation.losses, baseline.test.evaluation.losses)


def next_commands(context: Context, found: SearchResult, folder: Path) -> list[str]:
    """Commands worth trying after a run, as they can be typed here."""
    started_as = Path(sys.argv[0])
    if shutil.which("was-search"):
        program = "was-search"
    elif started_as.name == "was-search":
        program = os.path.relpath(started_as)
    else:
        program = "python -m was_search.cli"
    storage = "" if context.settings.storage == "embedded" else " --storage URL"
    return [
        f"{program} dashboard --study {found.study}{storage}",
        f"{program} status --study {found.study}{storage}",
        f"{program} evaluate --plan {folder} --split search",
        f"{program} generate --plan {folder} --prompt 'def main():' --max-new-tokens 64",
    ]
