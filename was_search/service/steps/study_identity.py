"""A study's identity, which decides whether two runs are of one study, and the name that is made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from was_search.service.settings import Settings
from was_search.service.steps.budgets import budget_of, target_label
from was_search.service.steps.question import Question
from was_search.studies.fitness import fitness_identity
from was_search.texts.protocol import content_hash
from was_search.vectors.budget import sparsity_identity
from was_search.vectors.descent import DescentOptions, chain_steps
from was_search.vectors.seeds import GREEDY_STEP, PRICES, SEED_DESCENT, SEED_SEQUENCES

if TYPE_CHECKING:
    from was_storage.server.database import Database


def identity(question: Question) -> dict[str, Any]:
    """Everything that decides a study's losses: another value of any entry is another study."""
    settings = question.settings
    search_protocol, calibration = question.tokens.search.protocol, question.tokens.calibration.protocol
    return {
        "model": question.model.fingerprint,
        "weights": settings.weights,
        **_target_identity(question),
        "score": settings.score,
        "masks": settings.masks,
        "sampler": settings.sampler,
        "space": settings.space,
        "radius": settings.radius,
        "seed": settings.seed,
        **seed_identity(settings),
        "descents": _descents_words(settings),
        "search data": search_protocol.to_json(),
        "calibration data": calibration.to_json(),
        **fitness_identity(settings.fitness, settings.kl_top_k),
    }


def _target_identity(question: Question) -> dict[str, Any]:
    """The budget's part of it; known without calibrating."""
    if not question.settings.target_speedup:
        return sparsity_identity(question.settings.target)
    return budget_of(question.settings, question.model.shape, question.latency).identity


def _descents_words(settings: Settings) -> str:
    if not settings.descent_epochs:
        return "none"
    steps = chain_steps(settings.descent_chains)
    chains = descent_words(search_descent_options(settings), settings.descent_sequences, steps)
    return f"epochs {settings.descent_epochs}, {chains}"


def search_descent_options(settings: Settings) -> DescentOptions:
    """How one chain of the search descends."""
    return DescentOptions(rounds=settings.descent_rounds)


def study_name(question: Question) -> str:
    """The settings' study name, or one made of model, data, target, sampler and a hash of the identity."""
    settings = question.settings
    if settings.study:
        return settings.study
    digest = content_hash(identity(question))[:8]
    return f"{question.model.label}-{target_label(settings)}-{settings.sampler}-{digest}"


def require_name(database: Database, question: Question, mine: dict[str, Any]) -> str:
    """The study's name, if it is valid, and free or taken by the study of these settings.

    Args:
        database: where studies are.
        question: the study's.
        mine: its :func:`identity`, whose making says what model or data lack before a database need be opened.

    Raises:
        StudyError: it is not valid, or another study's; each setting that differs is listed.
    """
    from was_storage.studies.store import StudyStore

    name = study_name(question)
    StudyStore(database).require_free_or_same(name, identity=mine)
    return name


def seed_identity(settings: Settings) -> dict[str, Any]:
    """What decides the seeds besides model, data and target: a part of a study's identity."""
    greedy, descends = f"sequences {settings.greedy_sequences}, step {GREEDY_STEP:g}", settings.seed_rounds > 0
    return {
        "pricing sequences": settings.pricing_sequences,
        "prices": PRICES,
        "greedy table": greedy if settings.greedy_sequences else "none",
        "slope sequences": settings.slope_sequences,
        "seed descent": descent_words(seed_descent_options(settings), SEED_SEQUENCES) if descends else "none",
        "warm start": settings.warm_start or None,
    }


def descent_words(options: DescentOptions, sequences: int, steps: tuple[float, ...] = ()) -> str:
    """Every number of a descent, for a study's identity; ``steps`` are those of chains side by side."""
    shown = {name: f"{value:g}" for name, value in {**vars(options), "sequences": sequences}.items()}
    if options.width == WIDTH_BEFORE:
        del shown["width"]
    if steps:
        shown["step"] = " and ".join(f"{step:g}" for step in steps)
    return ", ".join(f"{name} {value}" for name, value in sorted(shown.items()))


WIDTH_BEFORE = 0.5
"""The width of all descents before there was a choice; identities of then do not name it."""


def seed_descent_options(settings: Settings) -> DescentOptions:
    """How the Fisher seed descends from its prices."""
    return replace(SEED_DESCENT, rounds=settings.seed_rounds)
