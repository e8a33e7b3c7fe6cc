"""Descents with other first steps and another candidate, to choose the search's defaults on the demo checkpoint."""

from __future__ import annotations

from benchmarks.methods import CHAIN_STEPS, DESCENT, Method, descent, register

for _name, _steps, _half_way in (
    ("descent-0.03", (0.03, 0.03), False),
    ("descent-0.02", (0.02, 0.02), False),
    ("descent-0.01", (0.01, 0.01), False),
    ("descent-mixed", (0.04, 0.015), False),
    ("descent-half", CHAIN_STEPS, True),
    ("descent-0.02-half", (0.02, 0.02), True),
):
    register(
        Method(
            _name,
            descent(_steps, half_way=_half_way),
            spaces=("-",),
            settings={**DESCENT, "step": list(_steps), "half_way": _half_way},
            most_evaluations=120,
            seconds=1.0,
        )
    )
