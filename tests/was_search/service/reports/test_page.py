from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime

import numpy as np
import pytest

from was_search.service.reports.page import StudyPage, tally
from was_search.studies.slots import Slot, SlotState

NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
PAGE = StudyPage(
    study="a study",
    target=0.6,
    fitness="nll",
    kl_top_k=64,
    protocol="text [search]",
    seeds={"uniform": np.full(2, 0.6)},
    sensitivity=np.full((2, 7), 1e-3),
    settings={"trials": 9},
)


def slot(number: int, state: SlotState, loss: float | None = None, origin: str = "sampler:tpe", n: int = 8) -> Slot:
    vector = {"levels": np.full(2, 0.6), "sparsities": np.full((2, 7), 0.6)}
    more = {} if loss is None else {"losses": np.full(n, loss), "loss_nats": loss, "nll_nats": loss, "achieved": 0.6}
    return Slot(number, state, origin=origin, finished_at=NOW, started_at=NOW, worker="w", **vector, **more)


SLOTS = [
    slot(0, SlotState.COMPLETE, 3.0, "seed:uniform"),
    slot(1, SlotState.COMPLETE, 2.5, "seed:fisher"),
    slot(2, SlotState.STOPPED, 1.0, n=2),
    slot(3, SlotState.FAILED),
    slot(4, SlotState.COMPLETE, 2.25),
]


def test_the_note_tells_the_state_of_play_the_best_beside_the_seeds_and_the_settings():
    note = PAGE.note(SLOTS, 9, "running, workers: 2 ready", {}, NOW)
    assert note.startswith("# a study\n\nAt 2025-01-02 03:04:05 UTC: **running, workers: 2 ready**. 5 of 9 trials ")
    assert "3 complete, 1 stopped early (19 % of the tokens saved), 1 failed." in note  # 26 of 32 sequences
    assert "Best: slot 4 (sampler:tpe), 2.2500 nats per token, perplexity 9.488, on text [search]" in note
    assert "| **best** | 4 | 2.2500 | 9.488 |  |" in note
    assert "| fisher seed | 1 | 2.5000 | 12.182 | -0.2500 |" in note
    assert "| uniform | 0 | 3.0000 | 20.086 | -0.7500 |" in note
    assert json.loads(note.split("```json")[1].split("```")[0]) == {"trials": 9}
    assert "Exported" not in note


def test_of_a_divergence_the_note_says_what_it_is():
    note = dataclasses.replace(PAGE, fitness="kl").note(SLOTS, 9, "running", {}, NOW)
    assert "likeliest 64 tokens" in note
    assert "| search split | slot | nats of KL per token |" in note


def test_before_the_first_complete_trial():
    begun = [slot(0, SlotState.RUNNING), slot(1, SlotState.FAILED)]
    assert "No trial is complete yet." in PAGE.note(begun, 9, "running", {}, NOW)
    assert set(PAGE.figures(begun)) == {"progress", "progress-time", "timeline", "tokens-saved"}
    assert PAGE.figures(begun[:1]) == {}
    assert (
        tally([], 3) == "0 of 3 trials have finished: 0 complete, 0 stopped early (0 % of the tokens saved), 0 failed"
    )


def test_the_figures_are_plotlys_json():
    found = {name: json.loads(figure) for name, figure in PAGE.figures(SLOTS).items()}
    assert set(found) == {"progress", "progress-time", "timeline", "tokens-saved", "levels", "sensitivity"}
    assert all(figure["data"] and figure["layout"]["title"]["text"] for figure in found.values())
    assert [trace["name"] for trace in found["progress"]["data"]][-2:] == ["uniform", "fisher seed"]


def test_losses_beyond_every_perplexity_leave_a_page_that_browsers_read():
    slots = [dataclasses.replace(slot, loss_nats=900.0, nll_nats=900.0) for slot in SLOTS if slot.loss_nats]
    page = dataclasses.replace(PAGE, settings={"max_seconds": float("inf")})
    texts = [page.note(slots, 9, "running", {}, NOW).split("```json")[1].split("```")[0], *page.figures(slots).values()]
    for text in texts:
        json.loads(text, parse_constant=lambda word: pytest.fail(word))
