from __future__ import annotations

import gc

import pytest

from was_search.process.collector import collector_at_rest


@pytest.fixture(autouse=True)
def _as_before():
    ran = gc.isenabled()
    yield
    (gc.enable if ran else gc.disable)()


@pytest.mark.parametrize("ran", [True, False])
def test_it_rests_inside_and_is_afterwards_as_it_was(ran):
    (gc.enable if ran else gc.disable)()
    with collector_at_rest():
        assert not gc.isenabled()
    assert gc.isenabled() == ran


def test_it_is_woken_by_an_import_that_fails():
    gc.enable()
    with pytest.raises(ImportError), collector_at_rest():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
