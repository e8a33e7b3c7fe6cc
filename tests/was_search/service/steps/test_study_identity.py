"""Which settings make another study, and which say only how its trials are run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.doubles.profiles import synthetic_profile
from was_search.service import token_sets
from was_search.service.context import Context
from was_search.service.settings import OPTIONS, Settings
from was_search.service.steps.question import Question
from was_search.service.steps.study_identity import identity
from was_search.shape import ModelShape
from was_search.texts.protocol import EvaluationProtocol, TokenSet, content_hash
from was_search.vectors.budget import SparsityBudget

SHAPE = ModelShape(((8,) * 7,) * 2, ((8,) * 7,) * 2)
SMALL = {"model": "m", "data": "d", "dtype": "float32", "sequence_length": 8, "stride": 8, "dense_prefix": 1}

NOT_IDENTITY = {
    "where the model runs": ("device", "workers", "gpus_per_worker", "ray"),
    "each target of a command has a study of its own": ("targets", "target_speedups", "max_ppl_increase"),
    "how many trials, and when the search ends": (
        *("trials", "max_seconds", "max_gpu_seconds", "max_failures", "patience"),
    ),
    "how far a trial is evaluated; finished ones have the same losses": (
        *("early_stopping", "significance", "rung_keep"),
    ),
    "what a trial is chosen from, as what becomes of an interrupted run": ("sampler_lag",),
    "what becomes of workers and calls": (
        *("trial_timeout", "max_attempts", "quarantine_slowdown", "quarantine_failures", "quarantine_seconds"),
    ),
    "what follows the search": (
        *("test_sequences", "plan", "prefill", "compensation", "compensation_steps", "compensation_tokens"),
    ),
    "names, addresses and files": ("study", "storage", "metrics", "notify"),
}
NOT = {name for names in NOT_IDENTITY.values() for name in names}

OTHERS = {
    "dtype": "float16",
    "weights": "int8",
    "dense_prefix": 2,
    "stride": 4,
    "targets": "0.4,0.5",
    "target_speedups": "1.2,1.3",
    "max_ppl_increase": "5%",
    "sampler": "gp",
    "metrics": "9100",
    "notify": "https://example.org/x",
    "workers": "2:4",
    "gpus_per_worker": 0.5,
}
"""Values to change to, of options whose next one is no value."""


def other(name: str) -> Any:
    option, value = OPTIONS[name], getattr(Settings(**SMALL), name)
    if name in OTHERS:
        return OTHERS[name]
    if option.choices:
        return next(choice for choice in option.choices if choice != value)
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + (1 if isinstance(value, int) else 0.01)


class NoCache:
    """A cache that keeps nothing."""

    def get(self, *_: object) -> None:
        return None

    def put(self, *_: object) -> None:
        return None


def tokenised(model: Any, text: Any, options: dict[str, Any]) -> TokenSet:
    """Zeros under the protocol that the ``options`` ask for."""
    names = ("sequence_length", "stride", "n_sequences", "dtype", "batch_size", "dense_prefix", "weights")
    protocol = EvaluationProtocol(
        text.name, text.sha256, text.split, bos=False, **{name: options[name] for name in names}
    )
    return TokenSet.of(protocol, np.zeros((options["n_sequences"], options["sequence_length"]), np.int64))


def identity_of(**given: Any) -> dict[str, Any]:
    settings = Settings(**{**SMALL, **given})
    context = Context(settings)
    source = SimpleNamespace(tokenizer_hash=lambda: "")
    fingerprint = content_hash(settings.model, settings.revision)
    vars(context).update(
        model=SimpleNamespace(
            fingerprint=fingerprint, source=source, shape=SHAPE, token_rows=1, require_positions=lambda _: None
        ),
        cache=NoCache(),
        placement=SimpleNamespace(dtype=settings.dtype),
    )
    return identity(Question.of(context))


@pytest.fixture(autouse=True)
def no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(context: Context, split: str) -> Any:
        return SimpleNamespace(
            name=context.settings.data, sha256=content_hash(context.settings.data), split=split, kind=""
        )

    monkeypatch.setattr(token_sets, "_text", text)
    monkeypatch.setattr(token_sets, "_tokenise", tokenised)


def test_each_is_named_once():
    assert sum(len(names) for names in NOT_IDENTITY.values()) == len(NOT)
    assert set(OPTIONS) > NOT


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"profile", "target_speedup", "kl_top_k"}))
def test_a_setting_makes_another_study_unless_it_is_listed(name):
    """A new option fails here until somebody has decided what it is."""
    assert (identity_of() == identity_of(**{name: other(name)})) == (name in NOT)


def test_the_target_stands_in_it_as_in_every_study_so_far():
    """A study is found by its identity: the same words in the same order, for studies that are in a database."""
    assert list(identity_of(target=0.5).items())[1:4] == [("weights", "none"), ("target", 0.5), ("score", "l2")]
    assert identity_of(target=0.5)["target"] == SparsityBudget(SHAPE, 0.5).identity["target"]


def test_what_the_divergence_keeps_makes_another_study_of_the_divergence_only():
    assert identity_of() == identity_of(kl_top_k=16)
    assert identity_of(fitness="kl") != identity_of(fitness="kl", kl_top_k=16)


def test_a_profile_makes_another_study_of_a_speedup_only(tmp_path):
    one, another = (str(synthetic_profile(SHAPE, bend=bend).save(tmp_path / f"{bend}.json")) for bend in (0.35, 0.4))
    assert identity_of() == identity_of(profile=one)
    timed = [identity_of(profile=path, target_speedup=speedup) for path in (one, another) for speedup in (1.2, 1.3)]
    assert len({content_hash(found) for found in (*timed, identity_of())}) == 5
