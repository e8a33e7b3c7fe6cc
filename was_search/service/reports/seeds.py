"""The tables of a study's seeds."""

from __future__ import annotations

from typing import Any

from was_search.service.reports.progress import Reporter
from was_search.shape import PROJECTIONS, FloatArray
from was_search.vectors.seeds import Seed


def show_seeds(reporter: Reporter, seeds: list[Seed], costs: FloatArray, share: float) -> None:
    """Show the seeds' levels, and the last seed's sparsities with what each projection costs.

    Args:
        reporter: shows the tables.
        seeds: the study's.
        costs: prices [L, 7] of dropping ``share`` of a projection's inputs, as
            :func:`was_search.service.steps.seeding.sensitivity` gives them.
        share: the budget as one sparsity of all projections.
    """
    rows = [[seed.name, *(f"{100 * level:.0f}" for level in seed.levels)] for seed in seeds]
    columns = ["seed", *(str(b) for b in range(len(seeds[0].levels)))]
    reporter.table("Levels by block, %", columns, rows)
    reporter.table(
        f"Price of dropping {100 * round(share, 4):g} % of a projection's inputs, and what the seed drops",
        ["block", *PROJECTIONS],
        [
            [str(b), *(f"{1e3 * c:.3g} ({100 * s:.0f} %)" for c, s in zip(cost, row, strict=True))]
            for b, (cost, row) in enumerate(zip(costs, seeds[-1].sparsities, strict=True))
        ],
        caption="Fisher price, millinats per token for 1 % of all projections' weights; in brackets the seed's",
    )
    found: dict[str, Any] = {
        seed.name: {"levels": seed.levels.tolist(), "sparsities": seed.sparsities.tolist()} for seed in seeds
    }
    reporter.result({**found, "sensitivity": costs.tolist()})
