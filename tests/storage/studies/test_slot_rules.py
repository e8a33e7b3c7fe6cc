"""The real session keeps the contract ``SlotStore`` as the tests' slots in memory do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.doubles.slot_rules import SlotRules
from tests.doubles.small_study import new_study
from was_storage.server.database import Database
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


class TestCoordinatorSession(SlotRules):
    @pytest.fixture
    def store(self, database: Database) -> Iterator[CoordinatorSession]:
        with StudyStore(database).coordinate(new_study(database).name) as session:
            yield session
