from __future__ import annotations

import pytest

from was_search.errors import ConfigError
from was_search.weight_format import WeightFormat, brief, canonical, describe


@pytest.mark.parametrize(
    ("text", "bits", "group"), [("int8", 8, 128), ("int4", 4, 128), ("int4:64", 4, 64), ("int8:1024", 8, 1024)]
)
def test_parses(text, bits, group):
    assert WeightFormat.parse(text) == WeightFormat(bits, group)
    assert canonical(text) == f"int{bits}:{group}"
    assert canonical(canonical(text)) == canonical(text)


def test_none_is_no_format():
    assert WeightFormat.parse("none") is None
    assert canonical("none") == "none"
    assert describe("none") == "weights as stored"
    assert brief("none") == "weights as stored"
    assert brief("int4:64") == "int4:64 weights"
    assert describe("int4") == "int4 weights in groups of 128 outputs"


@pytest.mark.parametrize("text", ["", "int3", "int4:", "int4:0", "INT4", "int4:-32", "fp8", "int4:64:2", "4"])
def test_refuses(text):
    with pytest.raises(ConfigError, match=f"weights: must be none, int8 or int4, .*, got '{text}'"):
        WeightFormat.parse(text)


@pytest.mark.parametrize("group", [31, 33, 16, 100])
def test_refuses_groups_that_a_lane_would_straddle(group):
    with pytest.raises(ConfigError, match=f"a multiple of 32 outputs, got {group}"):
        WeightFormat.parse(f"int4:{group}")


def test_bytes_of_a_channel():
    assert WeightFormat(4).row_bytes(4096) == 2048 + 32 * 4
    assert WeightFormat(8).row_bytes(4096) == 4096 + 32 * 4
    assert WeightFormat(4).row_bytes(33) == 17 + 4  # an odd row, and one short group
