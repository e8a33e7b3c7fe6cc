"""The standing problems: models and texts that rows are kept of, each with its file and the options it is run with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Standing:
    """What the command line takes where nothing else is given.

    Attributes:
        model: what rows call the model; its fingerprint is what counts.
        results: the file of its rows.
        targets: sparsities.
        evaluations: budget of each run, in full evaluations.
        checkpoints: evaluations after which a method's vector is confirmed too, those below the budget.
        methods: as on the command line; none for all.
        setup: fields of :class:`benchmarks.harness.problem.Setup` that differ from its defaults.
    """

    model: str
    results: Path
    targets: tuple[float, ...]
    evaluations: float
    checkpoints: tuple[float, ...]
    methods: tuple[str, ...] = ()
    setup: dict[str, Any] = field(default_factory=dict)


STANDING = {
    "demo": Standing(
        "demo",
        RESULTS / "search_quality.jsonl",
        targets=(0.5, 0.6, 0.7, 0.8),
        evaluations=500.0,
        checkpoints=(10.0, 25.0, 50.0, 120.0, 250.0, 500.0),
    ),
    "real": Standing(
        "SmolLM2-135M-Instruct",
        RESULTS / "search_quality_real.jsonl",
        targets=(0.3, 0.4, 0.5, 0.6, 0.7),
        evaluations=120.0,
        # A vector's confirmation costs a tenth of its search: it is confirmed once.
        checkpoints=(),
        methods=(
            *("uniform", "greedy-uniform", "fisher", "linear-ramp", "was-monotone"),
            *("random:levels", "tpe:levels", "cmaes:levels", "evolution:levels", "descent-9"),
            "descent-9-compensated",
        ),
        setup={
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "data": "wikitext2",
            "dtype": "bfloat16",
            "sequence_length": 1024,
            "batch_size": 16,
            "calibration_sequences": 32,
            "pricing_sequences": 16,
            "slope_sequences": 94,
            "greedy_sequences": 2,
            "search_sequences": 24,
            "test_sequences": 144,
        },
    ),
}
