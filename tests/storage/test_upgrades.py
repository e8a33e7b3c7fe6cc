"""What earlier versions stored: dumps of every revision of the schema, opened and gone on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import psycopg2
import pytest
from optuna.trial import TrialState
from sqlalchemy import make_url

from tests.storage.small_study import assert_one_to_one, vector, whole
from was_search.control import Wish
from was_search.slots import SlotState
from was_storage.cache import ArtifactCache
from was_storage.control import ControlStore
from was_storage.database import Database
from was_storage.schema import HEAD
from was_storage.studies import StudyStore

pytestmark = pytest.mark.postgres

DUMPS = sorted((Path(__file__).parent / "dumps").glob("*.sql"))
STUDY = "an older study"


def restore(url: str, dump: Path) -> None:
    found = make_url(url)
    connection = psycopg2.connect(dbname=found.database, user=found.username, **found.query)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(dump.read_text(encoding="utf-8"))
    finally:
        connection.close()


def test_the_present_revision_has_its_dump() -> None:
    """`python scripts/dump_schema.py` writes it."""
    assert HEAD in [dump.stem for dump in DUMPS]


@pytest.mark.parametrize("dump", DUMPS, ids=lambda path: path.stem)
def test_a_study_of_that_revision_is_read_and_gone_on_with(dump: Path, postgres_server, request) -> None:
    url = postgres_server.url(f"upgrade_{dump.stem}")
    restore(url, dump)
    with Database.open(url) as database:
        store = StudyStore(database)
        record = store.get(STUDY)
        assert record.n_slots == 6
        assert record.report == {"exported": {"candidate": "slot 0"}}
        states = [slot.state for slot in store.slots(STUDY)]
        assert states == [
            SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED, SlotState.COMPLETE,
            SlotState.WAITING, SlotState.WAITING,
        ]  # fmt: skip
        first = store.slots(STUDY)[0]
        np.testing.assert_array_equal(first.losses, [2.5, 2.25, 2.0])
        assert (first.loss_nats, first.achieved, first.worker) == (2.25, 0.6, "worker-0")
        artifact = ArtifactCache(database).get("histograms", "key", whole)
        assert artifact is not None
        assert (artifact.payload, artifact.meta) == (b"payload", {"blocks": 2})
        assert ControlStore(database).read(STUDY).wish is Wish.RUN
        with store.coordinate(STUDY) as session:
            assert session.repaired == 0
            session.propose(5, **vector(5))
            for number in (4, 5):
                attempt = session.start(number, "worker-1", 60)
                session.finish(number, attempt, SlotState.COMPLETE, losses=np.array([2.0]), worker="worker-1")
            assert_one_to_one(database, session)
        trials = optuna.load_study(study_name=STUDY, storage=database.optuna_storage()).trials
        assert [trial.state for trial in trials].count(TrialState.COMPLETE) == 4
