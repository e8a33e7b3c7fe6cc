"""What a study reports about itself, as JSON and as the note's Markdown: both splits, their gap, and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from was_search.masks.intervals import Interval
from was_search.process.plain_json import number
from was_search.service.reports.distance import DISTANCE_MEANING, distance_words
from was_search.texts.protocol import perplexity

if TYPE_CHECKING:
    from was_search.plan import Plan

GAP_MEANING = (
    "gap: (search loss - dense search loss) - (test loss - dense test loss), nats per token; overfitting to the "
    "search text shows as a gap that is more negative than uniform's, which was fitted to nothing"
)
"""What the gap means, in words. Sparsity hurts some texts more than others, so uniform's gap is not zero either."""


def gap_nats(search: float, dense_search: float, test: float, dense_test: float) -> float:
    """What sparsity costs on the search split less what it costs on the test split, nats per token.

    Negative where the search split suffers less than text that no search has seen.
    """
    return (search - dense_search) - (test - dense_test)


def increase(loss_nats: float, dense_nats: float) -> float:
    """Increase of perplexity over the dense model's, as a fraction; inf where that overflows, NaN for NaN."""
    difference = loss_nats - dense_nats
    return math.inf if difference >= 700 else math.expm1(difference)


def interval_json(interval: Interval | None) -> dict[str, float] | None:
    """An interval as JSON, None where nothing is compared."""
    return None if interval is None else dict(vars(interval))


def step_words(step: Mapping[str, Any]) -> str:
    """A plan's ``step``, the times of its decoding step, in words."""
    at, profile = step["achieved"], step["profile"]
    return (
        f"Predicted decoding step at the achieved sparsity: {at['predicted_ms']:.3f} ms, "
        f"{at['predicted_speedup']:.2f}x the dense step ({profile['device']}, {profile['dtype']}, "
        f"profile {profile['hash'][:8]})"
    )


def compensation_words(figures: Mapping[str, Any]) -> str:
    """What a compensation was worth, in words; ``figures`` are those of its provenance."""
    judged = figures["validation_kl_nats"]
    return (
        f"Compensation: divergence from the dense model {judged['without']:.4f} -> {judged['with']:.4f} nats per token "
        f"on {figures['validation_sequences']} calibration sequence(s) that it was not learned from"
    )


def note_lines(report: Mapping[str, Any]) -> list[str]:
    """Markdown lines on what was exported, from a study's ``report``; none before the first export.

    Args:
        report: as ``was_search.service.steps.exporting`` writes it, with ``comparison`` once ``run`` has compared.
    """
    if "exported" not in report or "gap_nats" not in report:
        return []
    exported, metrics = report["exported"], report["metrics"]
    dense = metrics["dense"]
    achieved = ", ".join(f"{split} {100 * value:.2f} %" for split, value in exported["achieved"].items())
    lines = [
        "## Exported",
        "",
        f"The {exported['candidate']}, thresholds re-taken at its own point. Achieved sparsity: {achieved}.",
        "",
        "| split | nats per token | perplexity | dense perplexity | increase |",
        "|---|---|---|---|---|",
    ]
    for split in ("search", "test"):
        mine, base = number(metrics[split]["loss_nats"]), number(dense[split]["loss_nats"])
        lines.append(
            f"| {split} | {mine:.4f} | {perplexity(mine):.3f} | {perplexity(base):.3f} "
            f"| {100 * increase(mine, base):+.2f} % |"
        )
    if words := distance_words(metrics["test"]):
        lines += ["", f"Test split: {words}. {DISTANCE_MEANING[0].upper()}{DISTANCE_MEANING[1:]}."]
    lines += ["", f"Gap {number(report['gap_nats']):+.4f}. {GAP_MEANING[0].upper()}{GAP_MEANING[1:]}."]
    if "compensation" in report:
        lines += ["", f"{compensation_words(report['compensation'])}."]
    if "step" in report:
        lines += ["", f"{step_words(report['step'])}."]
    for row in report.get("comparison", [])[-1:]:
        for key, name in (("test_against_uniform", "uniform"), ("test_against_fisher_seed", "the Fisher seed")):
            mean, low, high = (number((row.get(key) or {}).get(end)) for end in ("mean", "low", "high"))
            if low < high:  # equal where the seed itself was exported
                lines.append(
                    f"Test split, difference to {name}: {mean:+.4f}, 95 % interval "
                    f"[{low:+.4f}, {high:+.4f}] (paired by sequence; negative is better)."
                )
    return [*lines, ""]


def plan_gap_nats(plan: Plan) -> float:
    """The gap between the splits in a plan's own figures; :data:`GAP_MEANING` says what it means."""
    dense, search, test = plan.metrics["dense"], plan.metrics["search"], plan.metrics["test"]
    return gap_nats(*(number(m["loss_nats"]) for m in (search, dense["search"], test, dense["test"])))
