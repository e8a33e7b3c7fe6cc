"""Descents with other steps, epochs and candidates, to choose the search's defaults on the demo checkpoint.

All spend the tokens of 110 to 120 full evaluations.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.methods import Descents, register
from was_search.descent import DescentOptions

LONG = Descents((0.04, 0.04))
"""The default until it was compared with these."""

THREE = DescentOptions(rounds=16)
"""Three epochs of these are two of the default's 24."""

VARIANTS = {
    "0.03": Descents((0.03, 0.03)),
    "0.02": Descents((0.02, 0.02)),
    "0.01": Descents((0.01, 0.01)),
    "0.04": LONG,
    "half": replace(LONG, half_way=True),
    "0.02-half": Descents((0.02, 0.02), half_way=True),
    "quarter": replace(LONG, decay=0.25),
    "three": replace(LONG, epochs=3, options=THREE),
    "three-0.03": Descents((0.03, 0.03), epochs=3, options=THREE),
    "fine": replace(LONG, options=DescentOptions(rounds=24, last_step=0.1)),
}

for _name, _descents in VARIANTS.items():
    register(_descents.method(f"descent-{_name}"))
