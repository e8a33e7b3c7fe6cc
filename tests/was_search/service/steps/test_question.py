from __future__ import annotations

import pytest

from was_search.decode_time.profile import LatencyProfile
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.steps import dense as steps
from was_search.service.steps.question import Question


def test_another_target_has_another_target_and_study_only() -> None:
    settings = Settings(model="m", targets="0.4,0.5", trials=7, study="all", plan="here", warm_start="first")
    asked = Question.of(Context(settings))
    assert asked.at(0.4).settings == Settings(model="m", target=0.4, trials=7)
    named = asked.at(0.4, study="all-40", warm_start="first", plan="here/40").settings
    assert (named.study, named.warm_start, named.plan) == ("all-40", "first", "here/40")


def test_another_speedup() -> None:
    asked = Question.of(Context(Settings(target_speedups="1.5,2", profile="here.json")))
    assert asked.at(1.5, by_time=True).settings == Settings(target_speedup=1.5, profile="here.json")
    assert asked.at(1.5, by_time=True).at(0.4).settings == Settings(target=0.4, profile="here.json")


def test_all_targets_have_the_dense_model_that_any_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks first: it is calibrated once, in the one context."""
    calibrated = []

    def calibrate(*parts: object) -> object:
        calibrated.append(parts)
        return object()

    monkeypatch.setattr(steps, "calibrate", calibrate)
    context = Context(Settings())
    asked = Question.of(context)
    first, second = asked.at(0.4), asked.at(0.5)
    assert first.calibration is second.calibration is asked.calibration is first.at(0.7).calibration
    assert calibrated == [(context, asked.tokens)]


def test_each_target_finds_its_profile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Settings] = []

    def profile_of(context: Context, settings: Settings) -> LatencyProfile | None:
        found.append(settings)
        return None

    monkeypatch.setattr("was_search.service.steps.question.profile_of", profile_of)
    asked = Question.of(Context(Settings()))
    first = asked.at(0.4)
    assert first.latency is first.latency is None
    assert found == [first.settings]


def test_another_context_is_asked_anew() -> None:
    """What was opened for one context is closed with it."""
    context, other = Context(Settings()), Context(Settings(target=0.4))
    asked = Question.of(context)
    assert asked.on(context) is asked
    assert asked.on(other).settings.target == 0.4
    assert asked.on(other).dense.context is other
