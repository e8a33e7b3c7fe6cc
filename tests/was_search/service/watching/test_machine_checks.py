"""What doctor says of this machine."""

from __future__ import annotations

import pytest

from was_kernels.runtime import compiled_code
from was_search.service.watching import machine_checks


def test_a_compiler_for_products_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_code, "compiles_here", lambda: (True, ""))
    assert machine_checks._compiler().good and machine_checks._compiler().found == "compiles for this CPU"
    monkeypatch.setattr(compiled_code, "compiles_here", lambda: (False, "no C++ compiler is found"))
    found = machine_checks._compiler()
    assert found.good is None and found.found == "no C++ compiler is found"
    assert found.advice == "decoding on a CPU takes torch's own products, which is right but slower"
