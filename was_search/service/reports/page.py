"""What a study's page in optuna-dashboard shows: the note in Markdown, and figures as plotly's JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from was_search.decode_time.profile import LatencyProfile
from was_search.process.plain_json import dumps
from was_search.service.reports.study_report import note_lines
from was_search.shape import FloatArray
from was_search.studies.fitness import UNITS, FitnessName, fitness_words
from was_search.studies.slots import Slot, SlotState, best_slot, tokens_saved
from was_search.texts.protocol import perplexity

_BASELINES = {"seed:fisher": "fisher seed", "seed:warm": "warm seed", "seed:uniform": "uniform"}


@dataclass(frozen=True)
class StudyPage:
    """A study's page, made of what does not change while the study runs.

    Attributes:
        study: its name.
        target: the budget as one sparsity of all projections.
        fitness: what trials are compared by.
        kl_top_k: tokens that ``kl`` tells apart.
        protocol: protocol of the search split, in words.
        seeds: levels [L] by name.
        sensitivity: what each projection costs [L, 7], nats per percent of weights.
        settings: settings of the run, as JSON.
        latency: predicts steps; None where no profile is known.
    """

    study: str
    target: float
    fitness: FitnessName
    kl_top_k: int
    protocol: str
    seeds: Mapping[str, FloatArray]
    sensitivity: FloatArray
    settings: Mapping[str, Any]
    latency: LatencyProfile | None = None

    def note(self, slots: list[Slot], total: int, play: str, report: Mapping[str, Any], now: datetime) -> str:
        """The note of the page, in Markdown.

        Args:
            slots: at least the finished ones.
            total: slots of the study.
            play: the state of play in a few words.
            report: the study's report, once something was exported.
            now: the time of what the note says.
        """
        parts = [
            f"# {self.study}",
            f"At {now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC: **{play}**. {tally(slots, total)}.",
            *self._best(slots),
            "\n".join(note_lines(report)).strip(),
            f"## Settings\n\n```json\n{dumps(self.settings, indent=2)}\n```\n",
        ]
        return "\n\n".join(part for part in parts if part)

    def _best(self, slots: list[Slot]) -> list[str]:
        best = best_slot(slots)
        if best is None or best.loss_nats is None:
            return ["No trial is complete yet."]
        objective = {
            "nll": "The objective is the mean loss in nats per token",
            "kl": (
                "The objective is the divergence (KL) from the dense model's predictions in nats per token, over its "
                f"likeliest {self.kl_top_k} tokens and all others together; perplexity is of the text"
            ),
        }
        achieved = 100 * (np.nan if best.achieved is None else best.achieved)
        predicted = ""
        if self.latency is not None and best.sparsities is not None:
            predicted = f"; {self.latency.words(best.sparsities)}"
        return [
            f"Best: slot {best.number} ({best.origin}), {fitness_words(self.fitness, best.loss_nats, best.nll_nats)}, "
            f"on {self.protocol}; achieved sparsity {achieved:.2f} %{predicted}.",
            "\n".join(self._comparison(best, slots)),
            f"{objective[self.fitness]}. Trials `PRUNED` were stopped early: their first sequences showed that the "
            "best was better, or that most trials did better.",
        ]

    def _comparison(self, best: Slot, slots: list[Slot]) -> list[str]:
        """Table of the best slot beside the seeds, by the study's fitness."""
        rows = [("**best**", best)]
        for origin, name in _BASELINES.items():
            rows += [(name, s) for s in slots if s.origin == origin and s.state is SlotState.COMPLETE]
        lines = [
            f"| search split | slot | {UNITS[self.fitness]} per token | perplexity | best - this |",
            "|---|---|---|---|---|",
        ]
        for name, slot in rows:
            assert slot.loss_nats is not None and best.loss_nats is not None
            shown = "" if slot.nll_nats is None else f"{perplexity(slot.nll_nats):.3f}"
            difference = "" if slot is best else f"{best.loss_nats - slot.loss_nats:+.4f}"
            lines.append(f"| {name} | {slot.number} | {slot.loss_nats:.4f} | {shown} | {difference} |")
        return lines

    def figures(self, slots: list[Slot]) -> dict[str, str]:
        """The figures by id; those that need a complete slot are left out before there is one."""
        from was_search.service.reports import plots
        from was_search.service.reports.latency_plot import step_time_figure

        found: dict[str, Any] = {}
        if any(slot.state.finished for slot in slots):
            found |= {
                "progress": plots.progress_figure(slots, self.fitness),
                "progress-time": plots.progress_figure(slots, self.fitness, against="time"),
                "timeline": plots.timeline_figure(slots),
                "tokens-saved": plots.savings_figure(slots),
            }
            if self.latency is not None:
                found["step-time"] = step_time_figure(slots, self.latency, self.fitness)
        best = best_slot(slots)
        if best is not None and best.levels is not None and best.sparsities is not None:
            found |= {
                "levels": plots.levels_figure(best.levels, dict(self.seeds), self.target),
                "sensitivity": plots.sensitivity_figure(self.sensitivity, best.sparsities, self.target),
            }
        return {name: figure.to_json() for name, figure in found.items()}


def tally(slots: list[Slot], total: int) -> str:
    """How many of ``total`` slots have finished, and how."""
    counts = Counter(slot.state for slot in slots)
    done = sum(n for state, n in counts.items() if state.finished)
    return (
        f"{done} of {total} trials have finished: {counts[SlotState.COMPLETE]} complete, "
        f"{counts[SlotState.STOPPED]} stopped early ({100 * tokens_saved(slots):.0f} % of the tokens saved), "
        f"{counts[SlotState.FAILED]} failed"
    )
