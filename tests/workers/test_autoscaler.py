"""Whether a cluster may get nodes by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import was_workers.autoscaler as autoscaler
from tests.places import ray_clusters


@pytest.mark.parametrize(
    ("found", "adds"),
    [
        (ray_clusters.started_by_hand, False),
        (ray_clusters.started_by_hand_second, False),
        (ray_clusters.launched, True),
        (ray_clusters.on_kubernetes, True),
        (ray_clusters.on_kubernetes_fixed, False),
        (ray_clusters.just_started, False),
    ],
)
def test_an_autoscaler_that_adds_nodes_is_told_from_one_that_reports_them(
    found: Callable[[], tuple[bytes | None, Any]], adds: bool
) -> None:
    assert autoscaler.adds_nodes(*found()) is adds


@pytest.mark.parametrize("error", [ConnectionError("no head"), ValueError("no JSON"), AttributeError("another Ray")])
def test_what_cannot_be_told_may_grow(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def asked() -> bool:
        raise error

    monkeypatch.setattr(autoscaler, "_asked", asked)
    assert autoscaler.may_grow() is True
