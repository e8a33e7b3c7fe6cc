from __future__ import annotations

import pytest

from was_search.studies.origin import Origin, OriginKind
from was_search.studies.slots import Slot, SlotState


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("", Origin()),
        ("seed:fisher", Origin.seed("fisher")),
        ("seed:of:two", Origin.seed("of:two")),
        ("sampler:tpe", Origin.sampler("tpe")),
        ("descent:0:mean", Origin.descent(0, None)),
        ("descent:12:3", Origin.descent(12, 3)),
        ("interpolated", Origin(OriginKind.OTHER, "interpolated")),
        ("descent:first:1", Origin(OriginKind.OTHER, "descent:first:1")),
        ("descent:1", Origin(OriginKind.OTHER, "descent:1")),
    ],
)
def test_what_is_stored_is_what_was_written(text, origin):
    assert Origin.parse(text) == origin
    assert str(origin) == text


def test_a_slot_says_where_its_vector_comes_from():
    source = Slot(0, SlotState.COMPLETE, origin="descent:1:0").source
    assert (source.kind, source.epoch, source.chain) == (OriginKind.DESCENT, 1, 0)
    assert Slot(0, SlotState.WAITING).source.kind is OriginKind.NONE
