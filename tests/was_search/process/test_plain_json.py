"""What is not finite: one way to write it, one to read it again, and nobody who writes JSON another way."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from was_search.process.plain_json import dumps, finite, number

ROOT = Path(__file__).parents[3]
OTHERWISE = {
    "was_search/process/plain_json.py": "the one way",
    "was_search/process/logs.py": "log lines, which write such numbers as words, and never as JSON's numbers",
    "was_search/plan.py": "hashes of documents, as they were hashed when they were written",
    "was_search/checkpoints/fingerprint.py": "hashes",
    "was_search/checkpoints/files.py": "hashes of text",
    "was_search/checkpoints/column_layout.py": "names and counts",
    "was_search/checkpoints/plan_checkpoint.py": "a model's configuration as it was, and names",
    "was_search/decode_time/profile.py": "figures that are finite, or no profile",
    "was_search/texts/protocol.py": "hashes",
    "storage/was_storage/studies/cache.py": "hashes",
    "storage/was_storage/studies/page_rows.py": "text, and a version's number",
    "storage/was_storage/dashboard/plan_files.py": "names",
}


def strict(text: str) -> object:
    """The JSON of the standard, which has no word for what is not finite."""

    def refuse(word: str) -> object:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_at_any_depth():
    value = {"a": math.inf, "b": [1.5, -math.inf, (math.nan, 2)], "c": {"d": {"e": math.nan}}, "f": "inf", "g": True}
    expected = {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": {"e": None}}, "f": "inf", "g": True}
    assert finite(value) == expected
    assert strict(dumps(value)) == expected


def test_null_is_read_as_no_number():
    assert math.isnan(number(None)) and number(2) == 2.0


def test_a_new_type_of_number_is_no_way_around():
    class Loss(float):
        """numpy's float64 is a float too."""

    assert strict(dumps({"loss": Loss("inf")})) == {"loss": None}
    with pytest.raises(TypeError):
        dumps({"loss": object()})


def test_nobody_writes_json_another_way():
    """A file that must is named above, with what it writes."""
    found = set()
    for folder in ("was_search", "storage", "workers", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if "dump" in text else ():
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump"):
                    found.add(str(path.relative_to(ROOT)))
    assert found == set(OTHERWISE)
