"""The study that the coordinator is measured on: 32 levels, and any number of finished trials in its past."""

from __future__ import annotations

import numpy as np

from benchmarks.harness.virtual_pool import SEQUENCES, TOKENS
from was_search.service.reports.page import StudyPage
from was_search.shape import FloatArray, ModelShape
from was_search.studies.slots import SlotState
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.seeds import Seed
from was_search.vectors.space import LevelSpace, level_params, open_distributions
from was_search.vectors.table import uniform_table
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

STUDY = "scale"
BLOCKS = 32
TARGET = 0.6
RADIUS = 0.05
SHAPE = ModelShape(((4096,) * 6 + (11008,),) * BLOCKS, ((4096,) * 4 + (11008, 11008, 4096),) * BLOCKS)
BUDGET = SparsityBudget(SHAPE, TARGET)
IDENTITY = {"model": "virtual", "blocks": BLOCKS}
_AT_ONCE = 200


def seed() -> Seed:
    table = uniform_table(SHAPE)
    flat = np.full(BLOCKS, TARGET)
    return Seed("uniform", table, flat, table.sparsities(flat))


def space() -> LevelSpace:
    return LevelSpace(BUDGET, uniform_table(SHAPE), np.full(BLOCKS, TARGET), RADIUS)


def page() -> StudyPage:
    """The study's page, as a search shows it in optuna-dashboard."""
    seeds = {"uniform": np.full(BLOCKS, TARGET)}
    return StudyPage(STUDY, TARGET, "nll", 64, "virtual [search]", seeds, np.full((BLOCKS, 7), 1e-3), {})


def open_study(database: Database, n_slots: int) -> StudyStore:
    store = StudyStore(database)
    store.open_or_create(STUDY, identity=IDENTITY, config={}, shape=SHAPE.to_json(), n_slots=n_slots)
    return store


def attrs(sparsities: FloatArray) -> dict[str, object]:
    """User attributes such as the search loop gives every trial."""
    return {"nominal_sparsity": TARGET, "sparsities": np.round(sparsities, 4).tolist()}


def make_history(database: Database, finished: int) -> None:
    """A study of ``finished`` slots that are finished: the seed and steps around it, every third stopped early."""
    from was_search.studies.hand_outs import HandOut, Proposal, Result

    around, first = space(), seed()
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 0.3, SEQUENCES)
    with open_study(database, finished).coordinate(STUDY) as session:
        for begin in range(0, finished, _AT_ONCE):
            hand_outs, vectors = [], []
            for number in range(begin, min(begin + _AT_ONCE, finished)):
                params = level_params(np.clip(rng.normal(TARGET, RADIUS / 3, BLOCKS), TARGET - RADIUS, TARGET + RADIUS))
                sparsities = around.sparsities(params)
                origin, kinds = "sampler:tpe", around.distributions
                if number == 0:
                    origin, params, sparsities = "seed:uniform", level_params(first.levels), first.sparsities
                    kinds = open_distributions(BLOCKS)
                levels = SHAPE.levels(sparsities)
                proposal = Proposal(origin, params, kinds, levels, sparsities, attrs(sparsities))
                hand_outs.append(HandOut(number, "history", proposal))
                vectors.append(sparsities)
            attempts = session.begin(hand_outs, 60.0)
            results = []
            for hand_out, attempt, sparsities in zip(hand_outs, attempts, vectors, strict=True):
                stopped = hand_out.number % 3 == 2
                seen = SEQUENCES // 2 if stopped else SEQUENCES
                losses = (2.0 + float(np.square(sparsities - TARGET).sum()) + noise)[:seen]
                nll = float(losses.mean())
                results.append(
                    Result(
                        hand_out.number,
                        attempt,
                        SlotState.STOPPED if stopped else SlotState.COMPLETE,
                        losses,
                        nll,
                        nll,
                        TOKENS * seen // SEQUENCES,
                        10.0,
                        TARGET,
                        "history",
                        attrs={"perplexity": round(float(np.exp(nll)), 5), "nll_nats": nll},
                    )
                )
            session.finish_all(results)
