from __future__ import annotations

import pytest

from was_search.service.context import Context
from was_search.service.settings import Settings


def test_a_sibling_has_another_target_and_study_only() -> None:
    settings = Settings(model="m", targets="0.4,0.5", trials=7, study="all", plan="here", warm_start="first")
    sibling = Context(settings).at(0.4)
    assert sibling.settings == Settings(model="m", target=0.4, trials=7)
    named = Context(settings).at(0.4, study="all-40", warm_start="first", plan="here/40").settings
    assert (named.study, named.warm_start, named.plan) == ("all-40", "first", "here/40")


def test_a_sibling_for_a_speedup() -> None:
    root = Context(Settings(target_speedups="1.5,2", profile="here.json"))
    assert root.at(1.5, by_time=True).settings == Settings(target_speedup=1.5, profile="here.json")
    assert root.at(1.5, by_time=True).at(0.4).settings == Settings(target=0.4, profile="here.json")


def test_what_one_opens_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks first: the root opens, once, with the root's settings."""
    opened = []

    def open_it(settings: Settings) -> object:
        opened.append(settings.target)
        return object()

    monkeypatch.setattr("was_search.checkpoints.load.pick_device", lambda wanted: "cpu")
    monkeypatch.setattr("was_search.service.context.Placement", lambda *parts: open_it(root.settings))
    root = Context(Settings(dtype="float32"))
    first, second = root.at(0.4), root.at(0.5)
    assert first.placement_here is second.placement_here
    assert root.placement_here is first.at(0.7).placement_here
    assert opened == [0.6]


def test_results_and_tokens_are_shared_both_ways() -> None:
    root = Context(Settings())
    sibling = root.at(0.4)
    made = sibling.once("calibration", lambda: object())
    assert root.once("calibration", lambda: object()) is made
    assert root.at(0.5)._tokens is root._tokens


def test_closing_a_sibling_closes_nothing() -> None:
    root = Context(Settings())
    closed = []
    root._stack.callback(lambda: closed.append(True))
    with root.at(0.4):
        pass
    assert not closed
    root.close()
    assert closed == [True]
