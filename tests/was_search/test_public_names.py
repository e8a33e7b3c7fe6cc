"""What ``import was_search`` promises: these names, fetched when they are used, and the example of its docstring."""

from __future__ import annotations

import doctest

import pytest

import was_search
from tests.fresh_python import said_by


def test_every_public_name_is_there_and_listed() -> None:
    for name in was_search.__all__:
        assert getattr(was_search, name) is not None
        assert name in dir(was_search)
    documented = {line.split()[0] for line in (was_search.__doc__ or "").splitlines() if line.startswith("    ")}
    assert set(was_search.__all__) - {"__version__"} <= documented


def test_another_name_is_refused_as_python_does_it() -> None:
    with pytest.raises(AttributeError, match="module 'was_search' has no attribute 'nosuch'"):
        was_search.nosuch  # noqa: B018


def test_the_import_is_light() -> None:
    code = "import was_search, sys; print(sorted({'torch', 'ray', 'numpy', 'transformers'} & set(sys.modules)))"
    assert said_by(code) == "[]"


def test_the_example_of_the_docstring() -> None:
    found = doctest.testmod(was_search)
    assert (found.failed, found.attempted) == (0, 7)
