"""What a coordinator's session logs of its slots."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from tests.doubles.small_study import new_study, vector
from was_search.studies.hand_outs import HandOut, Proposal, Result
from was_search.studies.slots import SlotState
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

pytestmark = pytest.mark.postgres


def test_every_step_of_a_slot_is_an_event_with_its_ids(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="was_storage")
    record = new_study(database, 2)
    with StudyStore(database).coordinate(record.name) as session:
        (first,) = session.begin([HandOut(0, "worker-0@h:1", Proposal(**vector(0)))], 60)
        session.requeue(0, "it died")
        (second,) = session.begin([HandOut(0, "worker-1@h:2")], 60)
        result = Result(0, first, SlotState.COMPLETE, losses=np.array([2.0]), worker="worker-0@h:1")
        session.finish_all([result])
        session.finish_all([Result(0, second, SlotState.COMPLETE, losses=np.array([2.5]), worker="worker-1@h:2")])
        trial = session.slots()[0].trial_id
    events = [(r.getMessage(), r.fields) for r in caplog.records if hasattr(r, "fields")]
    told = [(name, fields) for name, fields in events if "slot" in fields]
    assert [name for name, _ in told] == [
        "slot handed out",
        "slot put back",
        "slot handed out",
        "late result ignored",
        "slot finished",
    ]
    ids: list[dict[str, Any]] = [fields for _, fields in told]
    assert all((f["study"], f["slot"], f["trial"]) == (record.name, 0, trial) for f in ids)
    assert (ids[0]["attempt"], ids[0]["worker"], ids[2]["attempt"]) == (1, "worker-0@h:1", 2)
    assert ids[1]["reason"] == "it died"
    assert (ids[4]["state"], ids[4]["loss_nats"], ids[4]["worker"]) == ("complete", 2.5, "worker-1@h:2")
    assert events[0][0] == "study taken over" and events[0][1]["epoch"] == 1
