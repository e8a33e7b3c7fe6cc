"""Sessions of these tests."""

from __future__ import annotations

import pytest

from was_storage.studies import pulse


@pytest.fixture(autouse=True)
def no_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinators do what the test says and nothing beside it, however slow the machine is."""
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 3600.0)
